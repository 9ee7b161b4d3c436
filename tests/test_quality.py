"""benchmarks/quality.py: which trials count as done, and which learning rate is chosen."""

import json
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality import JOINT, RULES, Bench, Sum, Trial, best_rate, configuration, resolved, result


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


def finished(out: Path, trial: Trial, config: dict) -> None:
    """A run directory with just what is read of it."""
    run = out / trial.name
    run.mkdir(parents=True, exist_ok=True)
    data = {"model": {"n_layers": 6, "d_model": 128}, "site": "mlp_in", "outliers": {}}
    (run / "config.json").write_text(json.dumps({"config": config, "data": data}))
    last = {"loss": 1, "fvu": 0.2, "l0": 15.0, "dead": 0.01, "full": 0.5}
    (run / "metrics.jsonl").write_text(f'{{"val_fvu": 9}}\n{json.dumps(last)}\n{{"val_fvu": 0.3}}\n')
    (run / "timing.jsonl").write_text('{"seconds": 2}\n{"seconds": 5}\n')
    figures = {"rows": 7, "fvu": {"all": 0.4}, "l0": 14, "dead": 0, "targets": {}, "store": "a path of this machine"}
    (run / "metrics.json").write_text(json.dumps(figures))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_trained_on_top_of_the_recipe(rule: str):
    config = resolved(sweep(rule)[0])
    config.check()
    assert config.model.activation == rule and config.layer == "0-5" and config.steps == 1800


def test_what_a_finished_run_measured_is_kept(tmp_path: Path):
    trial, out = sweep("topk")[0], tmp_path / "runs"
    bench = Bench(tmp_path / "store", out, 1)
    assert not bench.trained(trial) and result(trial) is None
    finished(out, trial, configuration(trial) | {"store": "elsewhere", "log": {}})
    assert bench.trained(trial)
    found = result(trial)
    assert found is not None and found["seconds"] == 7 and found["fvu"] == {"all": 0.4} and found["last"]["l0"] == 15
    assert found["last"]["val_fvu"] == 0.3 and "store" not in found and found["made"]
    assert result(Sum("sum", (trial, sweep("topk")[1]))) is None


def test_a_result_of_another_recipe_is_in_the_way(tmp_path: Path):
    trial = sweep("topk")[0]
    made = configuration(trial)
    made["sparsity"] = made["sparsity"] | {"revive": 1.0}
    keep(trial, config=made)
    with pytest.raises(SystemExit, match=r"another recipe \(sparsity.revive: 1.0 -> 6e-05\): delete it"):
        result(trial)
    finished(tmp_path, trial, made)
    assert not Bench(tmp_path / "store", tmp_path, 1).trained(trial)


def test_the_rate_of_a_sweep():
    """Least val FVU x sqrt(L0), of those under which few features die and that did not stop."""
    kind = JOINT["relu"]
    assert best_rate(kind) == kind.rates[1]
    low, middle, high = sweep("relu")
    keep(low, last={"val_fvu": 0.02, "l0": 16, "dead": 0.01})
    keep(middle, stopped="training has diverged. Lower --lr")
    keep(high, last={"val_fvu": 0.03, "l0": 4, "dead": 0.01})
    assert best_rate(kind) == kind.rates[2]
    keep(high, last={"val_fvu": 0.03, "l0": 4, "dead": 0.2})
    assert best_rate(kind) == kind.rates[0]
