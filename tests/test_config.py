"""Options: values that cannot go together, configuration files, what makes two runs the same."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from cltjax.command import run
from cltjax.config import (
    DataConfig,
    LogConfig,
    ModelConfig,
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
    ],
)
def test_impossible_values_are_refused(change: dict, named: str):
    with pytest.raises(UserError, match=named):
        dataclasses.replace(TrainConfig("0"), **change).check()


def test_json_is_the_way_back():
    config = TrainConfig("0-1", out=Path("somewhere"), lr=0.1, model=ModelConfig(7, 3), data=DataConfig(13))
    assert from_json(as_json(config)) == config
    with pytest.raises(UserError, match="unknown field 'lrr'"):
        from_json(as_json(config) | {"lrr": 3})
    with pytest.raises(UserError, match="layer"):
        from_json({"lr": 0.1})


def test_paths_and_logging_do_not_make_another_run():
    config = TrainConfig("0")
    moved = dataclasses.replace(config, store=Path("a"), out=Path("b"), config=Path("c"), log=LogConfig(every=3))
    assert differing(as_json(config), as_json(moved)) is None
    other = dataclasses.replace(config, model=ModelConfig(k=8))
    assert differing(as_json(config), as_json(other)) == "model.k: 16 -> 8"
    assert differing(as_json(config), as_json(dataclasses.replace(config, seed=1))) == "seed: 0 -> 1"


def test_help_needs_no_jax():
    code = "import sys, cltjax.config, cltjax.command; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
