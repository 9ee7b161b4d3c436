"""Options: values that cannot go together, configuration files, what makes two runs the same."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cltjax.command import run
from cltjax.config import (
    DataConfig,
    LogConfig,
    ModelConfig,
    SparsityConfig,
    TrainConfig,
    as_json,
    differing,
    from_json,
    read_config_file,
)
from cltjax.errors import UserError

CONFIG = """from cltjax.config import ModelConfig, TrainConfig
config = TrainConfig("0-2", lr=0.5, model=ModelConfig(k=3))
"""


def parsed(args: list[str]) -> TrainConfig:
    found = []
    run(TrainConfig, found.append, args, read_config_file)
    return found[0]


def test_command_line_overrides_the_config_file(tmp_path: Path):
    file = tmp_path / "x.py"
    file.write_text(CONFIG)
    config = parsed(["--config", str(file), "--model.features", "77", "--layer", "all"])
    expected = TrainConfig("all", config=file, lr=0.5, model=ModelConfig(features=77, k=3))
    assert config == expected == parsed([f"--config={file}", "--model.features", "77", "--layer", "all"])
    assert parsed(["--layer", "0"]) == TrainConfig("0")


@pytest.mark.parametrize("text", ["", "config = 3\n", CONFIG.replace("config =", "conf =")])
def test_a_config_file_without_config_is_refused(tmp_path: Path, text: str, capsys):
    file = tmp_path / "x.py"
    file.write_text(text)
    for args in (["--config", str(file)], ["--config", str(tmp_path / "no.py")], ["--layer", "0", "--config"]):
        with pytest.raises(SystemExit) as left:
            parsed(args)
        assert left.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_typo_gets_the_nearest_name(capsys):
    with pytest.raises(SystemExit) as left:
        parsed(["--layer", "0", "--model.featurs", "3"])
    assert left.value.code == 2 and "--model.features" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model": ModelConfig(features=5, k=7)}, "--model.k 7"),
        ({"model": ModelConfig(features=5, k=0)}, "--model.k 0"),
        ({"steps": 0}, "--steps"),
        ({"lr": float("nan")}, "--lr"),
        ({"decay": 1.5}, "--decay"),
        ({"data": DataConfig(buffer_mib=0)}, "--data.buffer-mib"),
        ({"log": LogConfig(every=0)}, "--log.every"),
        ({"model": ModelConfig(activation="top_k")}, "--model.activation is 'top_k', but must be one of topk, "),  # type: ignore[arg-type]
        ({"model": ModelConfig(k=2.7)}, "--model.k 2.7 must be a whole number"),
        ({"model": ModelConfig(k=(3, 2.5))}, "--model.k 2.5 must be a whole number"),
        ({"model": ModelConfig(features=100, k=0.001)}, "--model.k 0.001 is not between .*: it is 0 features"),
        ({"model": ModelConfig(k=-3)}, "--model.k -3 is not between"),
        ({"model": ModelConfig(k=float("nan"))}, "--model.k is nan"),
        ({"model": ModelConfig(k=())}, "--model.k needs a number"),
        ({"sparsity": SparsityConfig(penalty=2e-3)}, "--sparsity.penalty 0.002 does nothing under .* topk, only under"),
        ({"sparsity": SparsityConfig(ramp=0.5), "model": ModelConfig(activation="batchtopk")}, "--sparsity.ramp 0.5"),
        ({"sparsity": SparsityConfig(scale=2), "model": ModelConfig(activation="relu")}, "--sparsity.scale 2 does"),
        (
            {"sparsity": SparsityConfig(k_start=4, penalty=1e-3), "model": ModelConfig(activation="relu")},
            "--sparsity.k-start does nothing beside --sparsity.penalty",
        ),
        (
            {"sparsity": SparsityConfig(ramp=0.5), "model": ModelConfig(activation="jumprelu")},
            "--sparsity.ramp does nothing without --sparsity.penalty",
        ),
        (
            {"sparsity": SparsityConfig(penalty=-1), "model": ModelConfig(activation="relu")},
            "--sparsity.penalty -1 must",
        ),
        ({"sparsity": SparsityConfig(dead_after=-1)}, "--sparsity.dead-after -1"),
        ({"steps": 99, "warmup": 100}, "--warmup 100 is longer than the run"),
        ({"warmup": -1}, "--warmup -1 must be 0 or above"),
        ({"target_weights": (1.0, -1.0)}, "--target-weights 1 -1 must"),
        ({"target_weights": (0.0, 0.0)}, "--target-weights 0 0 must"),
        ({"target_weights": (1.0, float("nan"))}, "--target-weights is "),
    ],
)
def test_impossible_values_are_refused(change: dict, named: str):
    with pytest.raises(UserError, match=named):
        replace(TrainConfig("0"), **change).check()


@pytest.mark.parametrize(
    "steps, given, resolved", [(2500, None, 100), (1000, None, 100), (999, None, 99), (50, None, 5)]
)
def test_warm_up_is_a_tenth_of_a_short_run(steps: int, given: int | None, resolved: int):
    config = TrainConfig("0", steps=steps, warmup=given)
    config.check()
    assert config.warmup_steps == resolved


def test_what_is_unusual_is_possible():
    model = ModelConfig(features=100, k=(3, 0.5))
    config = TrainConfig("0", steps=100, lr=1, target_weights=(0, 2.0), model=model)
    replace(config, sparsity=SparsityConfig(dead_after=0)).check()
    jumprelu = ModelConfig(activation="jumprelu")
    replace(
        config, model=jumprelu, sparsity=SparsityConfig(penalty=1, ramp=0, scale=2, bandwidth=2, threshold=1)
    ).check()
    relu = ModelConfig(activation="relu")
    replace(config, model=relu, sparsity=SparsityConfig(k_start=4)).check()
    # The slots of a recipe whose rule is overridden.
    replace(config, model=ModelConfig(features=100, k=64, slots=32)).check()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            'layer="0", model=ModelConfig(activation="top_k")',
            "--model.activation is 'top_k', but must be one of topk, ",
        ),
        ("layer=0", "--layer is 0, but must be text"),
        ('layer="0", model=ModelConfig(k="3")', "--model.k is '3', but must be a finite number or a tuple"),
        ('layer="0", model=3', "--model is 3, but must be ModelConfig"),
        ('layer="0", steps=True', "--steps is True, but must be a whole number"),
    ],
)
def test_a_wrong_value_in_a_config_file_is_one_line(tmp_path: Path, arguments: str, said: str, capsys):
    file = tmp_path / "x.py"
    file.write_text(f"from cltjax.config import *\nconfig = TrainConfig({arguments})")
    with pytest.raises(SystemExit) as left:
        parsed(["--config", str(file)])
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and line.startswith(f"error: --config {file}: {said}")


def test_text_is_a_path_and_a_list_a_tuple_in_a_config_file(tmp_path: Path):
    file = tmp_path / "x.py"
    text = """from cltjax.config import *
config = TrainConfig("0", out="runs/x", given=["r", "s"], model=ModelConfig(k=[3, 4]))"""
    file.write_text(text)
    wanted = TrainConfig("0", out=Path("runs/x"), given=(Path("r"), Path("s")), model=ModelConfig(k=(3, 4)))
    assert read_config_file(["--config", str(file)]) == wanted
    assert parsed(["--config", str(file)]) == replace(wanted, config=file)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("import math\nx = math.pie", "line 3: AttributeError: .*pie"),
        ("def f():\n    return {}['k']\nf()", "line 3: KeyError: 'k'"),
        ("int('x')", "line 2: ValueError: "),
        ("raise SystemExit", "line 2: SystemExit$"),
        ("x = = 3", "line 2: SyntaxError: invalid syntax"),
    ],
)
def test_a_config_file_that_fails_says_where(tmp_path: Path, fault: str, said: str):
    file = tmp_path / "x.py"
    file.write_text("import os\n" + fault)
    with pytest.raises(UserError, match=said) as error:
        read_config_file([f"--config={file}"])
    assert str(error.value).startswith(f"--config {file}, line ") and "\n" not in str(error.value)


def test_json_is_the_way_back():
    config = TrainConfig("0-1", out=Path("somewhere"), lr=0.1, model=ModelConfig(7, 3), data=DataConfig(13))
    assert from_json(as_json(config)) == config
    with pytest.raises(UserError, match="unknown field 'lrr'"):
        from_json(as_json(config) | {"lrr": 3})
    with pytest.raises(UserError, match="layer"):
        from_json({"lr": 0.1})
    for damaged in (as_json(config) | {"steps": "many"}, as_json(config) | {"model": []}, []):
        with pytest.raises(UserError, match="config.json is not a training configuration"):
            from_json(damaged)


def test_paths_and_logging_do_not_make_another_run():
    config = TrainConfig("0")
    moved = replace(config, store=Path("a"), out=Path("b"), config=Path("c"), log=LogConfig(every=3))
    moved = replace(moved, given=(Path("d"),), start_from=Path("e"))
    assert differing(as_json(config), as_json(moved)) is None
    other = replace(config, model=ModelConfig(k=8))
    assert differing(as_json(config), as_json(other)) == "model.k: 16 -> 8"
    assert differing(as_json(config), as_json(replace(config, seed=1))) == "seed: 0 -> 1"


def test_help_needs_no_jax():
    code = "import sys, cltjax.config, cltjax.command; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
