"""The recipes, and docs/training.md: what they say a run needs is what `cltjax estimate` prints today."""

import runpy
import shlex
from pathlib import Path

import pytest

from cltjax.cli import main
from cltjax.config import TrainConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.py"))
ESTIMATED = [path for path in RECIPES if "model_shape" in (ROOT / path).read_text()]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def docstring(path: Path) -> str:
    return runpy.run_path(str(path))["__doc__"]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_can_be_used_and_says_how(path: Path):
    config = runpy.run_path(str(path))["config"]
    assert isinstance(config, TrainConfig)
    config.check()
    text = docstring(path)
    for command in ("python capture/run.py", f"python train.py --config {path}", "python evaluate.py --clt"):
        assert f"\n    {command}" in text


def test_there_are_recipes_with_estimates():
    assert len(ESTIMATED) >= 4


@pytest.mark.parametrize("path", ESTIMATED, ids=str)
def test_what_a_recipe_says_it_needs_is_what_is_printed(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    _, found, after = docstring(path).partition("\n    cltjax estimate ")
    assert found
    arguments, *said = after.partition("\n\n")[0].rstrip().splitlines()
    monkeypatch.setattr("sys.argv", ["cltjax", "estimate", *shlex.split(arguments)])
    main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("    ") for line in said] == printed[: len(said)]
    assert any(line.startswith("memory ") for line in printed[: len(said)])
    assert any(line.startswith("the run ") for line in printed[: len(said)])


def test_the_estimate_in_the_documentation_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    block = (ROOT / "docs/training.md").read_text().partition("    $ cltjax estimate ")[2].partition("\n\n")[0]
    arguments, *said = block.splitlines()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["cltjax", "estimate", *shlex.split(arguments)])
    main()
    assert [line.removeprefix("    ").rstrip() for line in said] == [
        line.rstrip() for line in capsys.readouterr().out.splitlines()
    ]
