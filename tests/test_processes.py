"""Several processes as one run: real processes on CPU devices against one process; how they start, fail and go on."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from cltjax import distributed
from cltjax.checkpoint import Checkpoints, read_lines
from cltjax.command import run
from cltjax.config import EvaluateConfig, ProcessesConfig, TrainConfig
from cltjax.distributed import make_mesh, own_positions, place
from cltjax.errors import UserError
from cltjax.evaluation import evaluate, train_and_measure
from cltjax.normalisation import blank
from cltjax.step import TrainState, abstract_state
from cltjax.store import ActivationStore
from cltjax.training import train
from cltjax.wiring import wire
from stores import synthetic_store

LAYERS, D = 3, 7
PATIENCE = 120  # seconds after which a process is taken to hang
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile
GLOO = re.compile(r"Gloo|connected peer|peer ranks")  # what it says of its connections; a line may come in two pieces
CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_")  # what jax looks for in the environment
OPTIONS = (
    "--layer all --batch-size 24 --microbatches 2 --lr 1e-3 --warmup 0 --model.features 20 --model.k 3 --log.every 1"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return synthetic_store(tmp_path_factory.mktemp("processes") / "store", rows=1100, layers=LAYERS, d=D)


def options(store: ActivationStore, out: Path, more: str) -> list[str]:
    """A small joint run, for train.py."""
    return [*OPTIONS.split(), "--store", str(store.path), "--out", str(out), *more.split()]


def parsed(args: list[str]) -> TrainConfig:
    found = []
    run(TrainConfig, found.append, args)
    return found[0]


def srun(port: int, count: int, number: int) -> dict[str, str]:
    """What `JAX_COORDINATOR_PORT=PORT srun --ntasks COUNT` has in the environment of one task, as far as jax asks."""
    task = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "STEP_NUM_NODES": 1, "NTASKS": count}
    task |= {"PROCID": number, "LOCALID": number}
    return {"JAX_COORDINATOR_PORT": str(port)} | {f"SLURM_{name}": str(value) for name, value in task.items()}


@contextmanager
def started(commands: Sequence[list[str]], slurm: bool = False) -> Iterator[list[subprocess.Popen[str]]]:
    """train.py with each of these options, as processes that find each other; none is left when this ends."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    processes: list[subprocess.Popen[str]] = []
    try:
        for number, args in enumerate(commands):
            env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": FAST}
            whole = [sys.executable, "train.py", *args]
            if slurm:
                env |= srun(port, len(commands), number)
                whole += ["--processes.auto"]
            else:
                whole += ["--processes.coordinator", f"localhost:{port}"]
                whole += ["--processes.count", str(len(commands)), "--processes.id", str(number)]
            processes.append(
                subprocess.Popen(whole, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finished(commands: Sequence[list[str]], slurm: bool = False) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each process; what gloo says of its connections is left out."""
    found = []
    with started(commands, slurm) as processes:
        for process in processes:
            said = process.communicate(timeout=PATIENCE)
            out, err = ("\n".join(line for line in text.splitlines() if not GLOO.search(line)) for text in said)
            found.append((process.returncode, out, err))
    return found


def last_state(config: TrainConfig, folder: Path) -> TrainState:
    """The checkpoint after the last step, on one device."""
    wiring = wire(config.layer, LAYERS, config.offset, config.n_targets)
    checkpoints = Checkpoints(folder)
    assert checkpoints.last() == config.steps
    state, _ = checkpoints.restore(config.steps, abstract_state(config, wiring, blank(wiring, D), make_mesh("1x1")))
    checkpoints.close()
    return state


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    """|a - b| <= tolerance max|b| in every array (and number) of two pytrees."""
    here, there = jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b)
    assert len(here) == len(there) > 0
    for (path, x), (name, y) in zip(here, there, strict=True):
        assert path == name
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), (jax.tree_util.keystr(path), x, y)


def test_two_processes_equal_one(store: ActivationStore, tmp_path: Path):
    """Gradients, weights, thresholds, records and figures after one step on 2x2 and on one device; and who writes."""
    more = "--steps 1 --model.activation batchtopk"
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    config = parsed(options(store, alone, more))
    (status, said, _), *others = finished([options(store, shared, more + " --mesh 2x2")] * 2)
    assert status == 0 and "FVU on" in said
    assert others == [(0, "", "")]

    train_and_measure(config)
    one, two = last_state(config, alone), last_state(config, shared)
    moments = [optax.tree.get(state.optimiser, "mu") for state in (one, two)]  # a tenth of the first gradient
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(moments))
    close(moments[1], moments[0])
    close((two.parameters, two.constants, two.density), (one.parameters, one.constants, one.density))
    assert (np.asarray(two.silent) == np.asarray(one.silent)).all()
    close(read_lines(shared / "metrics.jsonl"), read_lines(alone / "metrics.jsonl"))
    assert len(read_lines(shared / "timing.jsonl")) == 1
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (shared, alone)]
    assert figures[0]["rows_by_group"] == figures[1]["rows_by_group"]
    for name in ("fvu", "targets", "l0"):
        close(figures[0][name], figures[1][name], 1e-4)
    assert sorted(path.name for path in (shared / "plots").iterdir()) == sorted(
        path.name for path in (alone / "plots").iterdir()
    )


def test_under_slurm_two_processes_equal_one(store: ActivationStore, tmp_path: Path):
    """Two steps; who the others are is taken from what srun puts into the environment. Rows stay on the devices."""
    more = "--steps 2 --log.val-rows 0"
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    (status, said, _), other = finished([options(store, shared, more + " --mesh 2x2 --device-cache")] * 2, slurm=True)
    assert status == 0 and "FVU on" in said
    assert other == (0, "", "")

    train(parsed(options(store, alone, more)))
    assert len(read_lines(alone / "metrics.jsonl")) == 2
    close(read_lines(shared / "metrics.jsonl"), read_lines(alone / "metrics.jsonl"))


def test_one_is_killed_and_all_go_on(store: ActivationStore, tmp_path: Path):
    """On 1x4, whose every process needs all rows: the other process ends too, and the run is resumed by two processes,
    and a copy of it by one."""
    more = "--steps 12 --log.checkpoint-every 3 --log.val-rows 0"
    straight, killed, moved = tmp_path / "straight", tmp_path / "killed", tmp_path / "moved"
    args = options(store, killed, more + " --mesh 1x4")
    with started([args] * 2) as processes:
        began = time.monotonic()
        while not (killed / "checkpoints" / "3").exists():
            assert time.monotonic() < began + PATIENCE
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.005)
        processes[0].kill()
        assert processes[1].wait(PATIENCE) != 0
    shutil.copytree(killed, moved)

    statuses, said, _ = zip(*finished([args] * 2), strict=True)
    assert statuses == (0, 0) and f"resuming {killed} at step " in said[0] and "step      1/12" not in said[0]
    train(parsed(options(store, moved, more)))
    train(parsed(options(store, straight, more)))
    expected = read_lines(straight / "metrics.jsonl")
    for folder in (killed, moved):
        close(read_lines(folder / "metrics.jsonl"), expected, 1e-4)
        assert [record["step"] for record in read_lines(folder / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.parametrize(
    "differing, message",
    [
        ("--seed 3", "process 1 has other options than process 0"),
        ("--out {}", "config.json than process 0"),
    ],
)
def test_where_one_cannot_go_on_all_stop(store: ActivationStore, tmp_path: Path, differing: str, message: str):
    """With one line, of the process that knows why."""
    args = options(store, tmp_path / "run", "--mesh 2x2")
    (first, _, silence), (second, _, said) = finished([args, [*args, *differing.format(tmp_path / "other").split()]])
    assert (first, second) == (2, 2)
    assert not silence and len(said.splitlines()) == 1 and message in said


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "localhost:1", "id": 0}, "go together"),
        ({"coordinator": "localhost:1", "count": 2, "id": 2}, "--processes.id 2 is not between"),
        ({"coordinator": "localhost:1", "count": 2, "id": -1}, "--processes.id -1 is not between"),
        ({"coordinator": "localhost", "count": 2, "id": 0}, "HOST:PORT"),
        ({"coordinator": ":80", "count": 2, "id": 0}, "HOST:PORT"),
        ({"auto": True, "id": 0}, "leave"),
        ({"coordinator": "TAKEN", "count": 2, "id": 0}, "name another port"),
        ({"coordinator": "TAKEN", "count": 2, "id": 1}, "does not answer"),
    ],
)
def test_what_cannot_start_is_one_line(given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "START_SECONDS", 0.1)
    with socket.socket() as taken:
        taken.bind(("", 0))  # nobody else can have that port, and nothing listens there
        if given.get("coordinator") == "TAKEN":
            given = given | {"coordinator": f"localhost:{taken.getsockname()[1]}"}
        with pytest.raises(UserError, match=message) as error:
            distributed.start(ProcessesConfig(**given))
    assert "\n" not in str(error.value)


def test_part_of_the_options_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        run(TrainConfig, train, ["--layer", "0", "--processes.count", "2"])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.startswith("error: --processes.coordinator, ") and len(said.splitlines()) == 1


def test_no_cluster_is_one_line():
    args = [sys.executable, "train.py", "--layer", "0", "--processes.auto"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTERS)}
    ended = subprocess.run(args, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("error: --processes.auto finds no ") and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "owners, positions",
    [
        ([[0], [1]], ["0 1 2 6 7 8", "3 4 5 9 10 11"]),  # 2x1, one device a process
        ([[0, 1]], ["0 1 2 3 4 5 6 7 8 9 10 11"] * 2),  # 1x2
        ([[0], [0], [1]], ["0 1 2 3 6 7 8 9", "4 5 10 11"]),  # 3x1
        ([[0, 0], [1, 1]], ["0 1 2 6 7 8", "3 4 5 9 10 11"]),  # 2x2, two devices a process
        ([[0, 0, 1, 1]], ["0 1 2 3 4 5 6 7 8 9 10 11"] * 2),  # 1x4
        # 2x3: the middle process has devices in both rows, the others in one.
        ([[0, 0, 1], [1, 2, 2]], ["0 1 2 6 7 8", "0 1 2 3 4 5 6 7 8 9 10 11", "3 4 5 9 10 11"]),
    ],
)
def test_each_process_reads_what_its_devices_need(
    owners: list[list[int]], positions: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Of batches of 12 rows in two microbatches."""
    devices = np.array([[SimpleNamespace(process_index=owner) for owner in row] for row in owners])
    mesh: Any = SimpleNamespace(devices=devices, shape={"data": len(owners), "model": len(owners[0])})
    for number, expected in enumerate(positions):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        assert own_positions(mesh, 12, 2).tolist() == [int(word) for word in expected.split()]


@pytest.mark.parametrize("text", ["1x1", "2x1", "1x4", "3x2"])
def test_rows_are_placed_by_microbatch(text: str):
    mesh, rows = make_mesh(text), np.arange(24 * 5).reshape(24, 5)
    placed = place(rows[own_positions(mesh, 24, 2)], mesh, 24, 2)
    assert (np.asarray(placed) == rows.reshape(2, 12, 5)).all()
    assert placed.sharding.shard_shape(placed.shape)[1] == 12 // mesh.shape["data"]


def test_a_run_is_measured_on_any_mesh(store: ActivationStore, tmp_path: Path):
    """Beside a frozen one. Test rows do not divide into four; figures are those of one device."""
    assert len(store.rows_of("test")) % 4
    given, more = tmp_path / "given", "--steps 1 --log.val-rows 0"
    train(parsed(options(store, given, more + " --layer 0")))
    train(parsed(options(store, tmp_path / "run", more + f" --layer 1 --given {given}")))
    figures = [evaluate(EvaluateConfig(tmp_path / "run", store.path, mesh=mesh)) for mesh in ("1x1", "4x2")]
    for name in ("fvu", "targets", "sources"):
        close(figures[1][name], figures[0][name])
    with pytest.raises(UserError, match="--model.features 20 does not divide into the 8 shards"):
        evaluate(EvaluateConfig(tmp_path / "run", store.path, mesh="1x8"))
