"""benchmarks/quality.py: which trials count as done, and which learning rate is chosen."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality import JOINT, RULES, Bench, Sum, Trial, best_rate, configuration, resolved, result
from stores import synthetic_store


@pytest.fixture(autouse=True)
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are kept."""
    (folder := tmp_path / "kept").mkdir()
    monkeypatch.setattr(quality, "TRIALS", folder)
    return folder


def sweep(rule: str) -> list[Trial]:
    return list(JOINT[rule].sweep().values())


def keep(trial: Trial, **found) -> None:
    quality.write_json(quality.TRIALS / f"{trial.name}.json", {"config": configuration(trial)} | found)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_store(tmp_path_factory.mktemp("quality") / "store", rows=997, layers=6, d=7).path


def finished(out: Path, trial: Trial, config: dict, summary: bool = True) -> None:
    """A run directory with just what is read of it."""
    run = out / trial.name
    run.mkdir(parents=True, exist_ok=True)
    data = {"model": {"n_layers": 6, "d_model": 128}, "site": "mlp_in", "outliers": {}}
    (run / "config.json").write_text(json.dumps({"config": config, "data": data}))
    last = {"loss": 1, "fvu": 0.2, "l0": 15.0, "dead": 0.01, "full": 0.5}
    (run / "metrics.jsonl").write_text(f'{{"val_fvu": 9}}\n{json.dumps(last)}\n{{"val_fvu": 0.3}}\n')
    (run / "timing.jsonl").write_text('{"seconds": 2}\n{"seconds": 5}\n')
    (out / f"{trial.name}.txt").write_text("made here\nsaid\n")
    figures = {"rows": 7, "fvu": {"all": 0.4}, "l0": 14, "dead": 0, "targets": {}, "store": "a path of this machine"}
    if summary:
        (run / "metrics.json").write_text(json.dumps(figures))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_trained_on_top_of_the_recipe(rule: str):
    config = resolved(sweep(rule)[0])
    config.check()
    assert config.model.activation == rule and config.layer == "0-5" and config.steps == 1800


def test_what_a_finished_run_measured_is_kept(tmp_path: Path, store: Path):
    trial, out = sweep("topk")[0], tmp_path / "runs"
    bench = Bench(store, out, 1)
    assert not bench.trained(trial) and not bench.done(trial)
    made = configuration(trial) | {"store": "elsewhere", "log": {}}
    finished(out, trial, made, summary=False)
    assert not bench.trained(trial)
    finished(out, trial, made)
    assert bench.trained(trial) and bench.done(trial)
    found = result(trial)
    assert found is not None and found["seconds"] == 7 and found["fvu"] == {"all": 0.4} and found["last"]["l0"] == 15
    assert found["last"]["val_fvu"] == 0.3 and "store" not in found and found["made"] == "made here"


def test_trials_run_part_by_part_and_only_once(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    """Each thread has its share of the cores in every part; what a run that was given up said is its result."""
    low, middle, high = sweep("jumprelu")
    bench, ran = Bench(store, tmp_path, 2), []

    def train(command: list[str], *, stdout, **_) -> subprocess.CompletedProcess:
        trial = next(one for one in (low, middle, high) if str(tmp_path / one.name) in command)
        ran.append((trial, os.sched_getaffinity(0)))
        if trial == high:
            stdout.write("training has diverged. Lower --lr\n")
            return subprocess.CompletedProcess(command, 2)
        finished(tmp_path, trial, configuration(trial))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(quality, "made", lambda: "made here")
    monkeypatch.setattr(quality.subprocess, "run", train)
    cores = os.sched_getaffinity(0)
    for part in ([low], [low, middle, high]):
        bench.run(part)
    assert [trial for trial, _ in ran] in ([low, middle, high], [low, high, middle])
    assert all(share <= cores and len(share) == max(1, len(cores) // 2) for _, share in ran) or len(cores) % 2
    assert os.sched_getaffinity(0) == cores
    assert result(high) == {"made": "made here", "data": bench.data, "config": configuration(high)} | {
        "stopped": "training has diverged. Lower --lr"
    }


def test_what_was_made_otherwise_is_in_the_way(tmp_path: Path, store: Path):
    """By another recipe or on another store: a result, a run, and a sum of results."""
    trial, bench = sweep("topk")[0], Bench(store, tmp_path, 1)
    made = configuration(trial)
    made["sparsity"] = made["sparsity"] | {"revive": 1.0}
    recipe = r"another recipe \(sparsity.revive: 1.0 -> 6e-05\): delete it"
    keep(trial, config=made)
    with pytest.raises(SystemExit, match=recipe):
        result(trial)
    finished(tmp_path, trial, made)
    with pytest.raises(SystemExit, match=recipe):
        bench.trained(trial)
    both = Sum("both", (trial, sweep("topk")[1]))
    quality.write_json(quality.TRIALS / "both.json", {"configs": [configuration(both.trials[1]), made]})
    with pytest.raises(SystemExit, match=r"another recipe \(lr: "):
        result(both)
    keep(trial, data=bench.data | {"rows": [5]})
    with pytest.raises(SystemExit, match=r"another store \(rows: \[5\] -> \[1003\]\): delete it"):
        bench.done(trial)


def test_the_rate_of_a_sweep():
    """Least val FVU x sqrt(L0), of those under which few features die and that did not stop."""
    kind = JOINT["jumprelu"]
    assert best_rate(kind) == kind.rates[1]
    low, middle, high = sweep("jumprelu")
    keep(low, last={"val_fvu": 0.02, "l0": 16, "dead": 0.01})
    keep(middle, stopped="training has diverged. Lower --lr")
    keep(high, last={"val_fvu": 0.03, "l0": 4, "dead": 0.01})
    assert best_rate(kind) == kind.rates[2]
    keep(high, last={"val_fvu": 0.03, "l0": 4, "dead": 0.2})
    assert best_rate(kind) == kind.rates[0]
