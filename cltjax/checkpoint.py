"""The run directory's lasting part: config.json, Orbax checkpoints, and append-only JSON-lines files.

Checkpoints are saved and restored by all processes of a run; the rest is read by all and written by process 0.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from cltjax.checksum import checksum
from cltjax.config import NOT_THE_RUN, differing
from cltjax.distributed import agree, is_main, together
from cltjax.errors import UserError
from cltjax.files import naming, temporary_name, write_json
from cltjax.store import ActivationStore

CONFIG, METRICS, TIMING, SUMMARY = "config.json", "metrics.jsonl", "timing.jsonl", "metrics.json"
CHECKPOINTS = "checkpoints"
CHECKSUM = "checksum"
LEFT_OUT = ocp.PLACEHOLDER  # in place of an array that is not to be read

# Orbax logs the errors that it raises, each several times and with the traceback of a thread.
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR)


class Checkpoints:
    """The checkpoints of one run: the last one is kept, and the one with the best validation FVU. Saving goes on in
    the background."""

    def __init__(self, run: Path, measured: bool = True) -> None:
        """measured: whether those to be saved have a validation FVU. UserError where those that are there are damaged.

        What Orbax raises is of no type of its own, so all of it is taken for what is wrong with the files.
        """
        self.folder = (run / CHECKPOINTS).absolute()
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=worth, n=1, keep_checkpoints_without_metrics=False)
        keep = policies.AnyPreservationPolicy([policies.LatestN(1), best])
        options = ocp.CheckpointManagerOptions(
            best_fn=worth if measured else None, best_mode="max", preservation_policy=keep, create=True
        )
        try:
            self.manager = ocp.CheckpointManager(self.folder, options=options)
            self.manager.best_step()  # reads what was measured
        except Exception as error:
            raise UserError(
                f"{self.folder} cannot be read ({reason(error)}): restore it from a copy, or delete {run} and train "
                "again"
            ) from error

    def save(self, step: int, state: Any, meta: dict[str, Any], val_fvu: float | None) -> None:
        """Begin to save `state` (a named tuple of pytrees of 32-bit arrays) and `meta` (JSON) as they are after `step`
        steps.

        UserError where this, or what was begun before, cannot be saved.
        """
        self.wait()
        with together():
            self.check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        whole = meta | {CHECKSUM: checksum(state, meta)}
        composite = ocp.args.Composite(state=ocp.args.PyTreeSave(present(state)), meta=ocp.args.JsonSave(whole))
        try:
            self.manager.save(step, args=composite, metrics=None if val_fvu is None else {"val_fvu": val_fvu})
        except Exception as error:
            raise self.unsaved(error) from error

    def wait(self) -> None:
        """Until what is being saved is whole. UserError where it cannot be."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self.unsaved(error) from error

    def check_room(self, size: int) -> None:
        """UserError where so many bytes are more than the disk has. Orbax would find it out in the end, and say so in
        hundreds of lines."""
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise self.unsaved(OSError(f"{size / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free"))

    def unsaved(self, error: Exception) -> UserError:
        """What to say where saving failed."""
        kept = self.last()
        left = "there is no earlier one" if kept is None else f"that of step {kept} is kept"
        return UserError(
            f"a checkpoint cannot be saved in {self.folder} ({reason(error)}); {left}. Mend that, and start the same "
            "command again"
        )

    def last(self) -> int | None:
        """Steps done at the last whole checkpoint."""
        return last_step(self.folder.parent)

    def best(self) -> int | None:
        """Steps done at the checkpoint with the best validation FVU; None where none was measured."""
        return self.manager.best_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and meta of a checkpoint; `like` gives the state's shapes, dtypes and shardings. What is LEFT_OUT
        in it is not read.

        UserError where they cannot be read, or are not what was saved.
        """
        how = ocp.checkpoint_utils.construct_restore_args(present(like))
        state = ocp.args.PyTreeRestore(present(like), restore_args=how)  # StandardRestore takes no LEFT_OUT
        composite = ocp.args.Composite(state=state, meta=ocp.args.JsonRestore())
        try:
            found = self.manager.restore(step, args=composite)
            state, meta = like._replace(**found["state"]), dict(found["meta"])
        except Exception as error:
            raise UserError(
                f"{self.folder / str(step)} cannot be read ({reason(error)}): restore it from a copy, or delete it and "
                "train again"
            ) from error
        saved = meta.pop(CHECKSUM, None)
        if not agrees(saved, checksum(state, meta)):
            raise UserError(
                f"{self.folder / str(step)} is damaged: what is read is not what was saved. Restore it from a copy, or "
                "delete it and train again"
            )
        return state, meta

    def close(self) -> None:
        """Wait for what is being saved."""
        self.wait()
        self.manager.close()


def present(state: Any) -> dict[str, Any]:
    """The fields that a state has. Orbax would save None as a leaf: it could not be read where there is one field more,
    or fewer, than when it was saved."""
    return {name: value for name, value in state._asdict().items() if value is not None}


def reason(error: Exception) -> str:
    """What Orbax says, in so few words that a line holds them."""
    said = " ".join(str(error).partition("See full TensorStore details")[0].split())
    if "No space left on device" in said:  # at the end of a long message
        return "no space left on device"
    return f"{said[:160]}..." if len(said) > 160 else said or type(error).__name__


def agrees(saved: Any, found: list[int | None]) -> bool:
    """Whether a checksum is the saved one, as far as the state was read."""
    known = isinstance(saved, list) and len(saved) == len(found)
    return known and all(one is None or one == was for one, was in zip(found, saved, strict=True))


def last_step(run: Path) -> int | None:
    """Steps done at the last whole checkpoint of a run. Creates nothing; Orbax names a folder so once it is whole."""
    folder = run / CHECKPOINTS
    found = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return max(found, default=None)


def worth(metrics: dict[str, float]) -> float:
    """What the best checkpoint has most of."""
    return -metrics["val_fvu"]


def identity(store: ActivationStore) -> dict[str, Any]:
    """What makes two stores the same data, to be recorded beside a run."""
    spec = store.parts[0].spec.as_json()
    return {
        "model": store.model,
        "site": store.site,
        "dtype": store.dtype,
        "template": spec["template"],
        "dataset": {name: spec["dataset"].get(name) for name in ("spec", "fingerprint")},
        "options": spec["options"],  # which tokens were kept, what was generated, what it was computed in
        "layers": list(store.layers),
        "rows": [part.rows for part in store.parts],
        "samples": len(store.samples),
    }


def without_paths(data: dict[str, Any]) -> dict[str, Any]:
    """A run's data but for where the runs lie that it is trained beside, or starts from: moved, they are still the
    same."""
    given, start = data.get("given_runs", {}), data.get("start_run")
    pinned = {name: weights_of(pin) for name, pin in given.items()}
    return data | {"given_runs": pinned, "start_run": start and weights_of(start)}


def weights_of(pin: dict[str, Any]) -> dict[str, Any]:
    """Of what pins an earlier run: what its weights are, wherever it lies."""
    return {name: pin[name] for name in ("step", "digest")}


def digest_of(found: dict[str, Any], step: int) -> str:
    """sha256 of what a run's weights after `step` steps follow from: its configuration and data (config.json's content)
    without paths, mesh and the like."""
    config = {name: value for name, value in found["config"].items() if name not in NOT_THE_RUN}
    text = json.dumps([config, without_paths(found["data"]), step], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def claim(run: Path, config: dict[str, Any], data: dict[str, Any], resumable: bool) -> None:
    """Write config.json, or find that the run there is another one (UserError naming the first field that differs).

    To be called before anything else is written into `run`, which `check_folder` has let pass.
    """
    resolved = json.loads(json.dumps({"config": config, "data": data}))  # as it will be read back
    path = run / CONFIG
    with together():  # all have read what is there before it is written anew
        if resumable:
            old = read_config(run)
            for part, plain in (("config", dict), ("data", without_paths)):
                if difference := differing(plain(old[part]), plain(resolved[part])):
                    raise UserError(f"{run} holds another run ({part} {difference}): name another --out, or delete it")
    with together():
        if is_main():
            write_json(path, resolved)
    agree(f"another {path}", path.read_text(encoding="utf-8") if path.exists() else None)


def check_folder(run: Path, store: Path) -> None:
    """UserError where `run` is a folder of something else. It may be absent, empty, or a run directory."""
    whole = run.resolve()
    if store.resolve() in (whole, *whole.parents):
        raise UserError(f"--out {run} is in the activation store: name another folder")
    if (run / CONFIG).exists():
        read_config(run)
    elif run.exists() and any(path.name != temporary_name(CONFIG) for path in run.iterdir()):
        raise UserError(f"--out {run} is not empty, and no run directory: it has no {CONFIG}. Name another folder")


def read_config(run: Path) -> dict[str, Any]:
    """{"config", "data"} as `claim` wrote them."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{run} is no run directory: it has no {CONFIG} (python train.py writes one)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or delete {run} and train again") from error
    if not (isinstance(found, dict) and isinstance(found.get("config"), dict) and is_data(found.get("data"))):
        raise UserError(f"{path} is not the configuration of a training run: name another folder")
    return found


def read_summary(run: Path) -> dict[str, Any]:
    """The test figures of a run, empty where it was not measured. UserError where they are damaged."""
    path = run / SUMMARY
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): measure it again with evaluate.py") from error


def is_data(data: Any) -> bool:
    """Whether this is what `identity` makes, as far as a run is read by it."""
    model = data.get("model") if isinstance(data, dict) else None
    sizes = [model.get(name) for name in ("n_layers", "d_model")] if isinstance(model, dict) else [None]
    return all(isinstance(size, int) for size in sizes) and {"site", "outliers"} <= data.keys()


class Lines:
    """A file of one JSON value a line, to which lines are only ever added."""

    def __init__(self, path: Path, size: int) -> None:
        """Continue after the first `size` bytes; what an interrupted run wrote beyond them is cut off."""
        present = path.stat().st_size if path.exists() else 0
        if present < size:
            raise UserError(f"{path} is shorter than its checkpoint says: restore it, or delete {path.parent}")
        self.path, self.file = path, path.open("ab") if is_main() else None
        if self.file:
            self.file.truncate(size)

    def add(self, value: dict[str, Any]) -> None:
        if self.file:
            with naming(self.path):
                self.file.write(json.dumps(value).encode() + b"\n")
                self.file.flush()

    def size(self) -> int:
        """Bytes that are safely on disk; 0 on processes that write none."""
        if self.file is None:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        if self.file:
            with naming(self.path):
                self.file.close()


def whole_lines(path: Path) -> int:
    """Bytes of `path` up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; empty where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
