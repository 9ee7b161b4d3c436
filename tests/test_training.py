"""Training end to end on a small synthetic store: it learns, it resumes bit for bit, it stops where it must."""

import json
import math
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from stores import synthetic_store

from cltjax.checkpoint import Checkpoints, read_lines
from cltjax.config import DataConfig, EvaluateConfig, LogConfig, ModelConfig, TrainConfig, from_json
from cltjax.distributed import make_mesh
from cltjax.errors import UserError
from cltjax.evaluation import evaluate, train_and_measure
from cltjax.files import Lock
from cltjax.normalisation import blank
from cltjax.step import abstract_state, schedule
from cltjax.store import ActivationStore
from cltjax.training import train
from cltjax.wiring import wire

LAYERS, D = 4, 13


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


def test_resumed_equals_uninterrupted_bit_for_bit(store: ActivationStore, tmp_path: Path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(small(store, straight))
    for stop in (1, 4, 5):  # leaves before, with and after the first checkpoint, with records beyond it
        train(small(store, resumed), stop_after=stop)
        with (resumed / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 99, "half a li')
    train(small(store, resumed, log=LogConfig(every=2, checkpoint_every=5)))
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert [record["step"] for record in read_lines(straight / "metrics.jsonl")] == [2, 4, 6]
    assert checkpoint(resumed, 6) == checkpoint(straight, 6)


@pytest.mark.slow
def test_killed_at_any_moment_the_result_is_the_same(store: ActivationStore, tmp_path: Path):
    """train.py as a process, SIGKILL at ten moments from its start to its end, against one that is left alone."""
    options = ["--layer", "all", "--store", str(store.path), "--steps", "400", "--batch-size", "64"]
    options += ["--model.features", "61", "--model.k", "5", "--log.every", "7", "--log.checkpoint-every", "10"]

    def started(run: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "train.py", *options, "--out", str(run)], stdout=subprocess.DEVNULL)

    def records(run: Path) -> int:
        file = run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert started(straight).wait() == 0
    rng, kills, reached = np.random.default_rng(0), 0, set()
    while kills < 10:
        process = started(killed)
        goal = records(killed) + int(rng.integers(1, 6))  # kill once so many records are there
        while process.poll() is None:
            if records(killed) >= goal:
                time.sleep(rng.uniform(0, 0.05))
                break
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        reached.add(goal)
    assert kills == 10 and len(reached) > 5
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
    records = read_lines(run / "metrics.jsonl")
    assert records[-1]["fvu"] < records[0]["fvu"] and records[-1]["lr"] < 1e-2 / 100


def test_a_loss_that_is_not_finite_stops_the_run(store: ActivationStore, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite at step \d+; .*Lower --lr"):
        train(small(store, run, lr=1e30, steps=40, warmup=0))
    for record in read_lines(run / "metrics.jsonl"):
        assert math.isfinite(record["loss"])


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
    for missing in ("nothing", "part"):
        with pytest.raises(UserError, match="no run directory"):
            evaluate(EvaluateConfig(tmp_path / missing, store.path))


def test_learning_rate_rises_stays_and_falls():
    rate = schedule(TrainConfig("0", steps=100, warmup=9, decay=0.2, lr=2.0))
    values = [float(rate(step)) for step in range(100)]
    assert values[:3] == pytest.approx([0.2, 0.4, 0.6]) and values[9:80] == pytest.approx([2.0] * 71)
    assert values[90] == pytest.approx(1.0) and values[99] == pytest.approx(0.1)
