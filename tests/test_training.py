"""Training end to end on a small synthetic store: it learns, it resumes bit for bit, it stops where it must."""

import errno
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from flax import nnx

from cltjax.batches import Batch, Batches
from cltjax.checkpoint import LEFT_OUT, Checkpoints, Lines, last_step, read_lines
from cltjax.config import (
    Activation,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    ModelConfig,
    SparsityConfig,
    TokensConfig,
    TrainConfig,
    from_json,
)
from cltjax.distributed import make_mesh
from cltjax.errors import UserError
from cltjax.evaluation import evaluate, train_and_measure
from cltjax.files import Lock
from cltjax.normalisation import blank
from cltjax.runs import Trained, load, load_given
from cltjax.step import abstract_state, schedule
from cltjax.store import ActivationStore
from cltjax.store_format import IMAGE, unpack
from cltjax.tokens import token_rules
from cltjax.training import Loop, Trend, train
from cltjax.wiring import wire
from stores import synthetic_store

LAYERS, D = 4, 13
KILLS = 10  # of each run that is killed


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return synthetic_store(tmp_path_factory.mktemp("training") / "store", rows=8009, layers=LAYERS, d=D)


def small(held: ActivationStore, out: Path, **options) -> TrainConfig:
    """Six steps of a tiny joint CLT; records every 2 steps, checkpoints every 3: neither divides the other."""
    settings = {
        "steps": 6,
        "batch_size": 31,
        "warmup": 2,
        "lr": 4e-3,
        "model": ModelConfig(features=29, k=3),
        "data": DataConfig(page_rows=7, buffer_mib=1),
        "log": LogConfig(every=2, checkpoint_every=3),
    }
    return TrainConfig(**{"layer": "all", "store": held.path, "out": out, **settings, **options})


def checkpoint(run: Path, step: int) -> list[bytes]:
    """Every array of a checkpoint."""
    config = from_json(json.loads((run / "config.json").read_text())["config"])
    wiring = wire(config.layer, LAYERS, config.offset, config.n_targets)
    like = abstract_state(config, wiring, blank(wiring, D), make_mesh("1x1"))
    checkpoints = Checkpoints(run)
    assert checkpoints.last() == step
    state, _ = checkpoints.restore(step, like)
    checkpoints.close()
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_resumed_equals_uninterrupted_bit_for_bit(store: ActivationStore, tmp_path: Path, rule: Activation):
    """Under jumprelu also the penalty's weights, which follow k."""
    straight, resumed, model = tmp_path / "straight", tmp_path / "resumed", ModelConfig(29, 3, rule)
    train(small(store, straight, model=model))
    for stop in (1, 4, 5):  # leaves before, with and after the first checkpoint, with records beyond it
        train(small(store, resumed, model=model), stop_after=stop)
        with (resumed / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 99, "half a li')
    train(small(store, resumed, model=model, log=LogConfig(every=2, checkpoint_every=6)))
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    records = read_lines(straight / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [2, 4, 6]
    weights = [record.get("penalty_by_source") for record in records if "loss" in record]
    assert weights[0] != weights[1] if rule == "jumprelu" else weights == [None] * 3
    assert [record["step"] for record in records if "val_fvu" in record] == [3, 6]
    assert checkpoint(resumed, 6) == checkpoint(straight, 6)
    (file,) = (straight / "checkpoints").glob("6/metrics/metrics")
    assert records[-1] == {"step": 6, **json.loads(file.read_text())}


def test_a_run_of_before_there_was_a_steered_penalty_goes_on(store: ActivationStore, tmp_path: Path):
    """Its checkpoints lack that field, and its configuration has a penalty that did nothing."""
    run = tmp_path / "run"
    train(small(store, run), stop_after=4)
    found = json.loads((run / "config.json").read_text())
    found["config"]["sparsity"]["penalty"] = 1e-3
    (run / "config.json").write_text(json.dumps(found))
    names = json.loads((run / "checkpoints/3/state/_METADATA").read_text())["tree_metadata"]
    assert names and not any("penalty" in name for name in names)
    train(small(store, run))
    assert last_step(run) == 6 and load(run).penalty is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        "--model.activation topk",
        "--model.activation batchtopk --model.slots 10 --sparsity.revive 6e-5 --sparsity.dead-after 300",
        "--model.activation jumprelu --sparsity.k-start 2",
    ],
)
def test_killed_at_any_moment_the_result_is_the_same(store: ActivationStore, tmp_path: Path, rule: str):
    """train.py as a process, SIGKILL at random moments, against one that is left alone: every third time while it
    starts and compiles, otherwise after some more records."""
    options = ["--layer", "all", "--store", str(store.path), "--steps", "400", "--batch-size", "64", *rule.split()]
    options += ["--model.features", "61", "--model.k", "5", "--log.every", "7", "--log.checkpoint-every", "10"]
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}

    def started(run: Path) -> subprocess.Popen:
        command = [sys.executable, "train.py", *options, "--out", str(run)]
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)

    def records(run: Path) -> int:
        file = run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    began, process = time.monotonic(), started(straight)
    while process.poll() is None and not records(straight):
        time.sleep(0.01)
    starting = time.monotonic() - began
    assert process.wait() == 0
    silent = [record["dead"] for record in read_lines(straight / "metrics.jsonl") if "dead" in record]
    assert max(silent) > 0 or "revive" not in rule
    rng, kills, reached = np.random.default_rng(0), 0, set()
    while kills < KILLS:
        process = started(killed)
        if kills % 3 == 0:
            time.sleep(rng.uniform(0, starting))
        else:
            goal = records(killed) + int(rng.integers(1, 6))  # kill once so many records are there
            while process.poll() is None and records(killed) < goal:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            reached.add(goal)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills == KILLS and len(reached) > KILLS // 3
    assert started(killed).wait() == 0
    assert (killed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert checkpoint(killed, 400) == checkpoint(straight, 400)


def test_another_configuration_or_store_is_not_resumed(store: ActivationStore, tmp_path: Path):
    run = tmp_path / "run"
    train(small(store, run))
    before = (run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"model\.k: 3 -> 4"):
        train(small(store, run, model=ModelConfig(29, 4)))
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        train(small(store, run, seed=1))
    other = synthetic_store(tmp_path / "other", rows=1009, layers=LAYERS, d=D, seed=1)
    with pytest.raises(UserError, match="dataset.fingerprint"):
        train(small(other, run))
    assert before == ((run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes())
    with closing(Lock(run, "another train.py")), pytest.raises(UserError, match=r"another train\.py is writing"):
        train(small(store, run))
    train(small(store, run))  # finished: nothing is done
    assert before == ((run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes())


def test_it_learns_more_than_ridge_and_says_so(store: ActivationStore, tmp_path: Path, capsys):
    """On every target the layer-0 CLT's test FVU is below ridge's from the same input."""
    run = tmp_path / "L0"
    config = small(store, run, layer="0", steps=700, batch_size=128, lr=1e-2, model=ModelConfig(128, 6))
    train_and_measure(replace(config, log=LogConfig(every=100)))
    capsys.readouterr()
    figures = evaluate(EvaluateConfig(run, store.path, ridge=True))
    for layer, by in figures["targets"].items():
        assert by["all"]["fvu"] < 0.8 * figures["ridge"]["targets"][layer]["all"]["fvu"] < 0.8
        assert by["all"]["slope"] == pytest.approx(1, abs=0.05)
    said = capsys.readouterr().out
    assert "mean only" in said and "ridge" in said and f"{figures['fvu']['image']:.4f}" in said
    assert json.loads((run / "metrics.json").read_text())["fvu"] == figures["fvu"]
    source = json.loads((run / "metrics_L0.json").read_text())
    assert source["l0"] <= 6 and source["settings"]["k"] == 6 and 0 <= source["dead"] < 1
    for plot in ("loss", "fvu", "features", "density"):
        assert (run / "plots" / f"{plot}.png").stat().st_size > 10_000
    records = [record for record in read_lines(run / "metrics.jsonl") if "loss" in record]
    assert records[-1]["fvu"] < records[0]["fvu"] and records[-1]["lr"] < 1e-2 / 100


def test_a_loss_that_is_not_finite_stops_the_run(store: ActivationStore, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite at step \d+; .*Lower --lr"):
        train(small(store, run, lr=1e30, steps=40, warmup=0))
    for record in read_lines(run / "metrics.jsonl"):
        assert all(math.isfinite(record[name]) for name in ("loss", "val_fvu") if name in record)


@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
def test_a_learning_rate_thirty_times_too_high_ends_with_a_clear_stop(
    store: ActivationStore, tmp_path: Path, rule: Activation
):
    """At the same step whatever is logged or resumed. Here few features stay active, and the mean is not much worse."""
    said = []
    for every in (1, 10_000):
        run = tmp_path / str(every)
        config = small(store, run, steps=600, batch_size=128, lr=0.3, model=ModelConfig(64, 6, rule))
        config = replace(config, log=LogConfig(every=every, checkpoint_every=190, val_rows=64))
        if every == 1:
            train(config, stop_after=195)
        with pytest.raises(UserError, match=r"collapsed .* at step 202; .* step 190 is kept\. Lower --lr") as error:
            train(config)
        said.append(str(error.value))
    assert said[0] == said[1]
    with pytest.raises(UserError, match="collapsed"):  # and again
        train(config)


def test_what_has_diverged_is_not_saved(store: ActivationStore, tmp_path: Path):
    """Though a checkpoint is due after every step, and a record after none."""
    config = small(store, tmp_path / "run", steps=400, warmup=400, decay=0.0, lr=3.0, clip=1e9)
    with pytest.raises(UserError, match="diverged") as error:
        train(replace(config, log=LogConfig(every=10_000, checkpoint_every=1, val_rows=0)))
    stopped = last_step(tmp_path / "run") + 1  # type: ignore[operator]
    assert f"at step {stopped}; the checkpoint of step {stopped - 1} is kept" in str(error.value)


def test_when_a_run_is_given_up():
    config = TrainConfig("0", warmup=110, model=ModelConfig(100, (6, 10)))

    def after(steps: int, fvu: float, l0: float = 8.0, first: float = 1.0) -> Trend:
        trend = Trend()
        for _ in range(steps):  # two targets, two sources
            trend.add({"error": [2 * fvu, 0.0], "power": [1.0, 3.0], "l0": [l0, l0]})
        assert (trend.fvu, trend.l0, trend.first) == pytest.approx((fvu, l0, fvu))
        return replace(trend, first=first)

    assert after(309, 1.4).fault(config) is None and "diverged" in str(after(310, 1.4).fault(config))
    assert after(1000, 1.2).fault(config) is None
    assert after(3, 9.9).fault(config) is None and "diverged" in str(after(3, 10.1).fault(config))
    assert after(309, 0.6, 1.9).fault(config) is None and "L0 1.9 of 8" in str(after(310, 0.6, 1.9).fault(config))
    assert after(310, 0.6, 2.1).fault(config) is None and after(310, 0.4, 1.9).fault(config) is None
    penalised = replace(config, model=ModelConfig(100, 8, "jumprelu"))
    assert "training has collapsed (L0 1.9 of 8" in (after(310, 0.6, 1.9).fault(penalised) or "")
    given = replace(penalised, sparsity=SparsityConfig(penalty=0.1))  # k is not what it is to have
    assert after(310, 0.6, 1.9).fault(given) is None
    # Given runs that together predict the targets several times: 16 is what this run has to mend.
    assert after(1, 16, first=16).fault(config) is None and after(309, 159, first=16).fault(config) is None
    assert "FVU 161 on average, 16 at first" in str(after(3, 161, first=16).fault(config))
    assert after(310, 19.9, first=16).fault(config) is None and "16 at first" in str(
        after(310, 20.1, first=16).fault(config)
    )
    assert after(310, 7.9, 1.9, first=16).fault(config) is None and after(310, 8.1, 1.9, first=16).fault(config)
    assert "0.2 at first; the mean alone has 1" in str(after(310, 1.3, first=0.2).fault(config))
    assert after(310, 1.2, first=0.2).fault(config) is None
    spike = after(400, 0.3)
    spike.add({"error": [40.0], "power": [1.0], "l0": [8.0]})
    assert spike.fault(config) is None


def test_given_runs_that_count_a_target_several_times_are_mended(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where the sum begins far above the mean alone, that is no reason to stop; what goes up from there is. Interrupted
    or not, a run is judged by the same figures."""
    options = {"offset": 0, "steps": 230, "batch_size": 96, "lr": 1e-2, "model": ModelConfig(64, 6)}
    log = LogConfig(every=1000, checkpoint_every=150, val_rows=64)
    alone = tmp_path / "alone"
    train(small(store, alone, layer="0", **options, log=log))

    def several(*args) -> tuple[Trained, ...]:
        (one,) = load_given(*args)
        for head in one.clt.W_dec.values():
            head[...] = 8 * head[...]  # as if eight layers had been trained alone
        return (one,)

    monkeypatch.setattr("cltjax.training.load_given", several)
    options |= {"layer": "3", "given": (alone,)}
    trends = []
    for name, stops in (("straight", ()), ("resumed", (151,))):
        for stop in (*stops, None):
            train(small(store, tmp_path / name, **options, log=log), stop_after=stop)
        (file,) = (tmp_path / name / "checkpoints").glob("230/meta/metadata")
        trends.append(json.loads(file.read_text())["trend"])
    assert trends[0] == trends[1] and trends[0]["steps"] == 230
    assert trends[0]["fvu"] < 0.7 * trends[0]["first"] and trends[0]["first"] > 12
    with pytest.raises(UserError, match=r"diverged \(train FVU .* on average, \d\d.* at first"):
        train(small(store, tmp_path / "wild", **options | {"lr": 3.0, "clip": 1e9}, log=log))


def test_the_progress_line_has_no_speed_before_a_step_was_timed(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(small(store, tmp_path / "run", layer="0", steps=3, log=LogConfig(every=1, val_rows=0)))
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("step ")]
    assert len([line for line in said if line.startswith("first step done ")]) == 1
    assert [("tokens/s" in line, "waiting" in line, "left" in line) for line in lines] == [(False,) * 3] + [
        (True,) * 3
    ] * 2
    assert lines[0].startswith("step      1/3  loss ") and lines[-1].endswith("  left 0:00")
    timings = read_lines(tmp_path / "run" / "timing.jsonl")
    assert timings[0]["start_up"] > 0 and not any("start_up" in timing for timing in timings[1:])
    assert ["tokens_per_s" in timing for timing in timings] == [False, True, True]


def test_int8_rows_are_unpacked_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is trained is what training on the same rows as float32 gives, and what gets to the device is int8."""
    held = synthetic_store(tmp_path / "int8", rows=2003, layers=LAYERS, d=D, dtype="int8")
    train(small(held, tmp_path / "packed", microbatches=1))
    seen = []

    class Unpacked(Batches):
        def __call__(self, step: int) -> Batch:
            batch = super().__call__(step)
            seen.append(batch)
            return Batch(*map(unpack, batch))

    monkeypatch.setattr("cltjax.training.Batches", Unpacked)
    train(small(held, tmp_path / "floats", microbatches=1))
    assert {(part.dtype.name, part.shape) for batch in seen for part in batch} == {("int8", (31, 3, D + 4))}
    packed, floats = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("packed", "floats"))
    assert len(packed) == len(floats) == 5
    for one, other in zip(packed, floats, strict=True):
        assert one == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in other.items()}


def test_nothing_is_compiled_again(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once the annealing step, the step, and two checkpoints have been there."""
    compiled, done, note = [], [0], Loop.note

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(done[-1])

    def noted(self: Loop, step: int, waiting: dict) -> None:
        note(self, step, waiting)
        done.append(step)

    monkeypatch.setattr(Loop, "note", noted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    options = {"model": ModelConfig(29, 3, "batchtopk"), "sparsity": SparsityConfig(k_start=2, anneal=0.05)}
    try:
        train(small(store, tmp_path / "run", steps=301, **options, log=LogConfig(every=7, checkpoint_every=40)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(done) == 302 and 0 in compiled and [step for step in compiled if 10 < step < 18]
    assert [step for step in compiled if step > 81] == []


MEMORY = """
import sys
from pathlib import Path
from cltjax.config import DataConfig, LogConfig, ModelConfig, TrainConfig
from cltjax.training import Loop, train

steps, size, note = int(sys.argv[3]), int(sys.argv[4]), Loop.note

def noted(self, step, waiting):
    note(self, step, waiting)
    if step in (steps // 3, steps):
        status = Path("/proc/self/status").read_text()
        print("resident", status.split("VmRSS:")[1].split()[0])

Loop.note = noted
train(TrainConfig("all", store=Path(sys.argv[1]), out=Path(sys.argv[2]), steps=steps, batch_size=size,
    model=ModelConfig(29, 3), data=DataConfig(buffer_mib=1), log=LogConfig(every=50, checkpoint_every=10**6)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("steps, size", [(600, 1021), pytest.param(20_001, 101, marks=pytest.mark.slow)])
def test_memory_is_flat(store: ActivationStore, tmp_path: Path, steps: int, size: int):
    """From a third of the steps on. Batches that are kept take 64 MB, and 200 in the long version."""
    command = [sys.executable, "-c", MEMORY, str(store.path), str(tmp_path / "run"), str(steps), str(size)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    early, late = (int(line.split()[1]) for line in said.splitlines() if line.startswith("resident"))
    assert late - early < 24_000  # KiB


def test_ctrl_c_says_where_the_run_goes_on(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And it goes on to the same end."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(small(store, straight))
    note = Loop.note

    def interrupted(self: Loop, step: int, waiting: dict) -> None:
        if step == stop:
            raise KeyboardInterrupt
        note(self, step, waiting)

    for stop, where in ((2, "from the beginning"), (5, "from the checkpoint of step 3")):
        with monkeypatch.context() as patched:
            patched.setattr(Loop, "note", interrupted)
            with pytest.raises(KeyboardInterrupt) as error:
                train(small(store, stopped))
        assert str(error.value) == f"interrupted at step {stop - 1}; start the same command again to go on {where}"
    train(small(store, stopped))
    assert (stopped / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert checkpoint(stopped, 6) == checkpoint(straight, 6)


def test_a_full_disk_leaves_the_earlier_checkpoint(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    train(small(store, run), stop_after=4)
    full = ValueError("many words: " * 99 + "No space left on device [os_error_code='28']")
    for name, fault, said in (
        ("shutil.disk_usage", Mock(return_value=Mock(free=0)), r"0 MiB are free\)"),
        ("orbax.checkpoint.CheckpointManager.save", Mock(side_effect=full), r"\(no space left on device\)"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(name, fault)
            with pytest.raises(UserError, match=said + "; that of step 3 is kept"):
                train(small(store, run))
    train(small(store, run))
    assert last_step(run) == 6


def test_a_line_that_cannot_be_written_names_its_file(tmp_path: Path):
    lines = Lines(tmp_path / "metrics.jsonl", 0)
    lines.file = Mock()
    lines.file.flush.side_effect = lines.file.close.side_effect = OSError(errno.ENOSPC, "No space left on device")
    for write in (lambda: lines.add({"step": 3}), lines.close):
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert error.value.filename == str(tmp_path / "metrics.jsonl")


def damaged(store: ActivationStore, run: Path, message: str) -> None:
    """Neither read nor resumed, with one line."""
    for use in (lambda: load(run), lambda: train(small(store, run))):
        with pytest.raises(UserError, match=message) as error:
            use()
        assert "\n" not in str(error.value) and "train again" in str(error.value)


def test_a_damaged_checkpoint_is_one_line(store: ActivationStore, tmp_path: Path):
    whole = tmp_path / "whole"
    train(small(store, whole))
    data = max((whole / "checkpoints" / "6").rglob("*"), key=lambda path: path.stat().st_size).relative_to(whole)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    run = copy("truncated")
    for file in (run / "checkpoints" / "6" / "state").glob("**/d/*"):  # which of them has the weights is by chance
        os.truncate(file, 1)
    damaged(store, run, r"checkpoints/6 cannot be read")

    run = copy("measured")
    (file,) = (run / "checkpoints" / "6").glob("metrics/metrics")
    for content in ("{", '{"val_fvv": 3}', "[]"):
        file.write_text(content)
        damaged(store, run, r"checkpoints cannot be read")

    run = copy("meta")
    (file,) = (run / "checkpoints" / "6").glob("meta/metadata")
    file.write_text(file.read_text().replace('"metrics_bytes": ', '"metrics_bytes": 1'))
    damaged(store, run, r"checkpoints/6 is damaged")

    run = copy("flipped")
    before, rng = (whole / data).read_bytes(), np.random.default_rng(0)
    expected = checkpoint(whole, 6)
    refused = {"cannot be read": 0, "is damaged": 0}
    for bit in rng.integers(8 * len(before), size=12):
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << (bit % 8)
        (run / data).write_bytes(flipped)
        try:
            found = checkpoint(run, 6)
        except UserError as error:
            refused[next(said for said in refused if said in str(error))] += 1
        else:  # the bit was of nothing that is read
            assert found == expected
    assert refused["is damaged"] > 0


def test_a_damaged_configuration_is_one_line(store: ActivationStore, tmp_path: Path):
    run = tmp_path / "run"
    train(small(store, run))
    good = json.loads((run / "config.json").read_text())
    for content in (
        {"config": [], "data": 3},
        {"config": good["config"], "data": {}},
        {"config": good["config"], "data": good["data"] | {"model": {"n_layers": "4", "d_model": D}}},
    ):
        (run / "config.json").write_text(json.dumps(content))
        for use in (lambda: load(run), lambda: train(small(store, run))):
            with pytest.raises(UserError, match=r"config\.json is not the configuration of a training run"):
                use()


def test_a_folder_of_something_else_is_not_touched(store: ActivationStore, tmp_path: Path):
    other, model, run = (tmp_path / name for name in ("other", "model", "run"))
    for folder in (other, model):
        folder.mkdir()
    (other / "metrics.jsonl").write_text('{"mine": 1}\n')
    (model / "config.json").write_text('{"architectures": []}')
    train(small(store, run))

    def content() -> dict[Path, bytes]:
        folders = (store.path, other, model, run)
        return {path: path.read_bytes() if path.is_file() else b"" for one in folders for path in one.rglob("*")}

    before = content()
    for out, message in (
        (other, "is not empty, and no run directory"),
        (model, "not the configuration of a training run"),
        (store.path, "is in the activation store"),
        (store.path / "runs" / "L0", "is in the activation store"),
    ):
        with pytest.raises(UserError, match=message):
            train(small(store, out))
    with pytest.raises(UserError, match="holds another run"):
        train(small(store, run, seed=1))
    assert content() == before
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".config.json.tmp").write_text("{")  # of a run that was killed at once
    train(small(store, empty), stop_after=1)
    assert (empty / "config.json").is_file()


def test_a_run_of_the_older_row_order(store: ActivationStore, tmp_path: Path):
    """It is refused where it would go on, and no longer where it is done; so is one whose blocks are other ones."""
    run = tmp_path / "run"

    def record(row_order: dict | None) -> None:
        path = run / "config.json"
        whole = json.loads(path.read_text())
        data = {name: value for name, value in whole["data"].items() if name != "row_order"}
        path.write_text(json.dumps(whole | {"data": data | ({"row_order": row_order} if row_order else {})}))

    train(small(store, run), stop_after=3)
    mine = json.loads((run / "config.json").read_text())["data"]["row_order"]
    record(None)
    with pytest.raises(UserError, match="begun by an earlier version, which took rows in another order"):
        train(small(store, run))
    record(mine | {"block_rows": 1})
    with pytest.raises(UserError, match=f"row_order.block_rows: 1 -> {store.block_rows}"):
        train(small(store, run))
    record(mine)
    train(small(store, run))
    record(None)
    before, digest = (run / "config.json").read_text(), load(run).digest
    train(small(store, run))
    assert json.loads((run / "config.json").read_text()) == json.loads(before)
    assert load(run).digest == digest  # by which runs that were given this one know it


def test_one_validation_row_is_enough(store: ActivationStore, tmp_path: Path):
    """The first of the split is a special token, which is left out."""
    train(small(store, tmp_path / "run", log=LogConfig(val_rows=1)))
    (file,) = (tmp_path / "run" / "checkpoints").glob("6/metrics/metrics")
    assert json.loads(file.read_text())["val_fvu"] > 0


def test_thresholds_are_those_of_the_trained_mix(store: ActivationStore, tmp_path: Path):
    """k active features on average over tokens in the shares in which they are trained on, not as they come."""
    run, tokens = tmp_path / "run", TokensConfig(image_share=0.2)  # two of three of them are image tokens
    train(small(store, run, layer="0", model=ModelConfig(29, 5, "batchtopk"), tokens=tokens))
    clt = load(run).clt
    rows = token_rules(store, clt.wiring.sources, clt.wiring.targets, tokens).rows("val")
    active = np.asarray(clt.codes(store.read("site", rows, clt.wiring.sources)) > 0)[0].sum(-1)
    image = store.column("modality")[rows] == IMAGE
    assert 0.2 * active[image].mean() + 0.8 * active[~image].mean() == pytest.approx(5, abs=0.01)
    assert abs(active.mean() - 5) > 0.1

    bare = synthetic_store(tmp_path / "bare", rows=400, layers=LAYERS, d=D, splits=("train", "test"))
    with pytest.raises(UserError, match="no val rows"):
        train(small(bare, tmp_path / "bare run", model=ModelConfig(29, 3, "batchtopk"), tokens=tokens))


def test_options_that_do_nothing_are_named(store: ActivationStore, tmp_path: Path, capsys):
    train(small(store, tmp_path / "run", model=ModelConfig(29, 3, slots=7)), stop_after=1)
    assert "--model.slots 7 does nothing under topk" in capsys.readouterr().out
    train(small(store, tmp_path / "run2"), stop_after=1)
    said = capsys.readouterr().out
    assert "does nothing" not in said and "val rows: none" not in said and "given runs" not in said


def test_a_long_run_of_jumprelu_is_warned_of(store: ActivationStore, tmp_path: Path, capsys):
    for steps, revive in ((2501, 1e-4), (2500, 1e-4), (2501, 0.0)):
        rule, sparsity = ModelConfig(29, 3, "jumprelu"), SparsityConfig(revive=revive)
        run = small(store, tmp_path / f"{steps}-{revive}", steps=steps, model=rule, sparsity=sparsity)
        train(run, stop_after=1)
        warned = "jumprelu with --sparsity.revive may come apart" in capsys.readouterr().out
        assert warned == (steps == 2501 and revive > 0)


def test_without_val_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys):
    """What is calibrated on them does not begin; the rest is not measured on the way, and has no best."""
    store = synthetic_store(tmp_path / "store", rows=400, layers=LAYERS, d=D, splits=("train", "test"))
    for rule in ("batchtopk", "topk_joint"):
        with pytest.raises(UserError, match="no val rows"):
            train(small(store, tmp_path / rule, model=ModelConfig(29, 3, rule)))
        assert not (tmp_path / rule).exists()
    orbax = logging.getLogger("absl")  # through which Orbax would warn that there is no best
    orbax.addHandler(caplog.handler)
    train(small(store, tmp_path / "run"))
    orbax.removeHandler(caplog.handler)
    assert "val rows: none, so there is no val FVU and no best checkpoint" in capsys.readouterr().out
    assert not [record for record in caplog.records if record.name == "absl" and record.levelno >= logging.WARNING]
    with closing(Checkpoints(tmp_path / "run")) as checkpoints:
        assert checkpoints.best() is None and checkpoints.last() == 6


def test_a_run_is_loaded_without_what_only_training_needs(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, seen = tmp_path / "run", []
    train(small(store, run))
    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda *args: seen.append(restore(*args)) or seen[-1])
    clt = load(run).clt
    ((state, _),) = seen
    assert all(leaf is LEFT_OUT for leaf in jax.tree.leaves(state[2:]))
    held = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.split(clt, nnx.Param, ...)[1:])]
    assert held == checkpoint(run, 6)[: len(held)]


def test_silent_tokens_are_counted(store: ActivationStore, tmp_path: Path):
    """A feature that is not active in a step gets that step's tokens added; an active one starts at 0 again."""
    run = tmp_path / "run"
    train(small(store, run, layer="0", lr=1e-9))  # weights that stand still, more features than are ever active
    config = small(store, run, layer="0")
    wiring = wire("0", LAYERS, 1, 16)
    like = abstract_state(config, wiring, blank(wiring, D), make_mesh("1x1"))
    checkpoints = Checkpoints(run)
    state, _ = checkpoints.restore(6, like)
    checkpoints.close()
    silent = np.asarray(state.silent)
    assert int(state.step) == 6
    assert set(silent.ravel().tolist()) <= {31 * n for n in range(7)} and (silent == 0).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": "3"}, "layer 3 has no target"),
        ({"layer": "4"}, "layer 4 does not exist"),
        ({"layer": "zero"}, "not of the form"),
        ({"store": Path("nowhere")}, "capture"),
        ({"model": ModelConfig(5, 7)}, "--model.k 7"),
    ],
)
def test_what_cannot_be_trained_is_one_line(store: ActivationStore, tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        train(small(store, tmp_path / "run", **options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_stores_that_lack_layers_or_test_rows(tmp_path: Path, store: ActivationStore):
    part = synthetic_store(tmp_path / "part", rows=200, layers=5, d=3, captured=(0, 1, 3))
    with pytest.raises(UserError, match=r"target layer 2 was not captured .*layers 0-1,3"):
        train(small(part, tmp_path / "run", layer="0"))
    train(small(part, tmp_path / "run", layer="0", n_targets=1))
    untested = synthetic_store(tmp_path / "untested", rows=200, layers=2, d=3, splits=("train", "val"))
    with pytest.raises(UserError, match="no test rows"):
        train(small(untested, tmp_path / "run2"))
    with pytest.raises(UserError, match=r"model\.n_layers 5, but .* has 4"):
        evaluate(EvaluateConfig(tmp_path / "run", store.path))
    wide = synthetic_store(tmp_path / "wide", rows=200, layers=5, d=5, captured=(0, 1, 3))
    with pytest.raises(UserError, match=r"model\.d_model 3, but .* has 5"):
        evaluate(EvaluateConfig(tmp_path / "run", wide.path))
    for missing in ("nothing", "part"):
        with pytest.raises(UserError, match="no run directory"):
            evaluate(EvaluateConfig(tmp_path / missing, store.path))


def test_learning_rate_rises_stays_and_falls():
    rate = schedule(TrainConfig("0", steps=100, warmup=9, decay=0.2, lr=2.0))
    values = [float(rate(step)) for step in range(100)]
    assert values[:3] == pytest.approx([0.2, 0.4, 0.6]) and values[9:80] == pytest.approx([2.0] * 71)
    assert values[90] == pytest.approx(1.0) and values[99] == pytest.approx(0.1)


def test_warm_up_is_what_it_resolves_to(store: ActivationStore, tmp_path: Path):
    """A short run needs no other option; and it is the same run where its warm-up is named."""
    options = {"layer": "0", "steps": 30, "log": LogConfig(every=3, checkpoint_every=7, val_rows=0)}
    rate = schedule(TrainConfig("0", steps=30, lr=2.0))
    assert [float(rate(step)) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    train(small(store, tmp_path / "run", **options, warmup=None), stop_after=8)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["warmup"] == 3
    train(small(store, tmp_path / "run", **options, warmup=3))
    with pytest.raises(UserError, match="warmup: 3 -> 2"):
        train(small(store, tmp_path / "run", **options, warmup=2))
