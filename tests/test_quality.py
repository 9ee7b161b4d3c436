"""benchmarks/quality.py: which trials count as done."""

import json
import shlex
from pathlib import Path

import pytest

from benchmarks.quality import JOINT, RULES, Bench, Trial, configuration
from cltjax.config import from_json


def trial_of(rule: str) -> Trial:
    return next(iter(JOINT[rule].sweep().values()))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_trained_on_top_of_the_recipe(rule: str):
    config = from_json(configuration(trial_of(rule)))
    config.check()
    assert config.model.activation == rule and config.layer == "0-5" and config.steps == 1800


def test_a_trial_of_another_recipe_is_in_the_way(tmp_path: Path):
    """One of this recipe is done once it is measured, wherever it lies and whatever is logged."""
    trial, bench = trial_of("topk"), Bench(tmp_path / "store", tmp_path, 1, True)
    run = tmp_path / trial.name
    run.mkdir()
    assert not bench.done(trial)
    (tmp_path / f"{trial.name}.options").write_text(shlex.join(trial.options))
    made = configuration(trial) | {"store": "elsewhere", "log": {}}
    (run / "config.json").write_text(json.dumps({"config": made, "data": {}}))
    assert not bench.done(trial)
    (run / "metrics.json").write_text("{}")
    assert bench.done(trial)
    made["sparsity"] = made["sparsity"] | {"revive": 1.0}
    (run / "config.json").write_text(json.dumps({"config": made, "data": {}}))
    with pytest.raises(SystemExit, match=r"another recipe \(sparsity.revive: 1.0 -> 6e-05\): delete it"):
        bench.done(trial)
