"""The run directory's lasting part: config.json, Orbax checkpoints, and append-only JSON-lines files.

Checkpoints are saved and restored by all processes of a run; the rest is read by all and written by process 0.
"""

import json
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from cltjax.config import differing
from cltjax.distributed import agree, is_main, together
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.store import ActivationStore

CONFIG, METRICS, TIMING, SUMMARY = "config.json", "metrics.jsonl", "timing.jsonl", "metrics.json"


class Checkpoints:
    """The checkpoints of one run: the last one is kept, and the one with the best validation FVU. Saving goes on in
    the background."""

    def __init__(self, run: Path) -> None:
        self.folder = (run / "checkpoints").absolute()
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=worth, n=1, keep_checkpoints_without_metrics=False)
        keep = policies.AnyPreservationPolicy([policies.LatestN(1), best])
        options = ocp.CheckpointManagerOptions(best_fn=worth, best_mode="max", preservation_policy=keep, create=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any], val_fvu: float | None) -> None:
        """Begin to save `state` (a pytree of arrays) and `meta` (JSON) as they are after `step` steps."""
        composite = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.save(step, args=composite, metrics=None if val_fvu is None else {"val_fvu": val_fvu})

    def last(self) -> int | None:
        """Steps done at the last whole checkpoint."""
        return self.manager.latest_step()

    def best(self) -> int | None:
        """Steps done at the checkpoint with the best validation FVU; the last one where none was measured."""
        return self.manager.best_step() or self.last()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and meta of a checkpoint; `like` gives the state's shapes, dtypes and shardings."""
        composite = ocp.args.Composite(state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
        try:
            found = self.manager.restore(step, args=composite)
        except (ValueError, OSError, KeyError, TypeError) as error:  # what Orbax meets in files that are not whole
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(
                f"{self.folder / str(step)} cannot be restored ({reason}): restore it from a copy, or train again"
            ) from error
        return found["state"], found["meta"]

    def close(self) -> None:
        """Wait for what is being saved."""
        self.manager.wait_until_finished()
        self.manager.close()


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


def claim(run: Path, config: dict[str, Any], data: dict[str, Any], resumable: bool) -> None:
    """Write config.json, or find that the run there is another one (UserError naming the first field that differs)."""
    resolved = json.loads(json.dumps({"config": config, "data": data}))  # as it will be read back
    path = run / CONFIG
    with together():  # all have read what is there before it is written anew
        if path.exists():
            read_config(run)  # else it is somebody else's config.json
        if resumable:
            old = read_config(run)
            for part in ("config", "data"):
                if difference := differing(old[part], resolved[part]):
                    raise UserError(f"{run} holds another run ({part} {difference}): name another --out, or delete it")
    with together():
        if is_main():
            write_json(path, resolved)
    agree(f"another {path}", path.read_text(encoding="utf-8") if path.exists() else None)


def read_config(run: Path) -> dict[str, Any]:
    """{"config", "data"} as `claim` wrote them."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{run} is no run directory: it has no {CONFIG} (python train.py writes one)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or delete {run} and train again") from error
    if not isinstance(found, dict) or {"config", "data"} - found.keys():
        raise UserError(f"{path} is not the configuration of a training run: name another folder")
    return found


class Lines:
    """A file of one JSON value a line, to which lines are only ever added."""

    def __init__(self, path: Path, size: int) -> None:
        """Continue after the first `size` bytes; what an interrupted run wrote beyond them is cut off."""
        present = path.stat().st_size if path.exists() else 0
        if present < size:
            raise UserError(f"{path} is shorter than its checkpoint says: restore it, or delete {path.parent}")
        self.file = path.open("ab") if is_main() else None
        if self.file:
            self.file.truncate(size)

    def add(self, value: dict[str, Any]) -> None:
        if self.file:
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
            self.file.close()


def whole_lines(path: Path) -> int:
    """Bytes of `path` up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; empty where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
