"""What a user's mistake looks like from outside: one line, status 2."""

import ast
import errno
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cltjax.command import run
from cltjax.config import read_config_file
from cltjax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """Options of a test."""

    steps: int = 3
    """How many."""


def outcome(work, args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run(Options, work, args)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def test_a_user_error_and_a_path_that_cannot_be_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")

    def wrong(options: Options) -> None:
        raise UserError("do this instead")

    def blocked(options: Options) -> None:
        (tmp_path / "file").mkdir()

    assert outcome(wrong, [], capsys) == (2, "error: do this instead\n")
    code, line = outcome(blocked, [], capsys)
    assert code == 2
    assert line.count("\n") == 1
    assert str(tmp_path / "file") in line


def test_a_full_disk_and_ctrl_c_are_one_line(capsys: pytest.CaptureFixture[str]):
    def full(options: Options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def stopped(options: Options) -> None:
        raise KeyboardInterrupt("interrupted at step 3")

    def stopped_early(options: Options) -> None:
        raise KeyboardInterrupt

    assert outcome(full, [], capsys) == (
        2,
        "error: a file cannot be written: No space left on device. Make room, and start again\n",
    )
    assert outcome(stopped, [], capsys) == (130, "interrupted at step 3\n")
    assert outcome(stopped_early, [], capsys) == (130, "interrupted\n")


def test_a_typo_is_answered_with_the_nearest_name(capsys: pytest.CaptureFixture[str]):
    code, printed = outcome(lambda options: None, ["--setps", "4"], capsys)
    assert code == 2
    assert "--steps" in printed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("from cltjax.config import TrainConfig\nconfig = TrainConfig(layer='0', stepz=3)", "near: steps"),
        ("config = ", "invalid syntax"),
        ("x = 1", "must define"),
    ],
)
def test_a_config_file_that_is_wrong(tmp_path: Path, content: str, reason: str):
    path = tmp_path / "x.py"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        read_config_file(["--config", str(path)])


def test_the_help_of_an_option_is_one_line_of_its_file():
    """Where it is several, --help breaks the lines there, too."""
    for name in ("cltjax/config.py", "capture/config.py"):
        tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        helps = [node.value for one in classes for node in one.body[1:] if isinstance(node, ast.Expr)]
        assert len(helps) >= 10
        assert [one.lineno for one in helps if one.lineno != one.end_lineno] == [], name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--clt", "nothing", "--store", "none"], "no activation store at none"),
        (["--clt", "nothing", "--model", "examples/shapes/model"], "nothing is no CLT directory"),
        (["--clt", "nothing", "--model=x", "--ridge"], "ridge"),  # an option of the other kind of measuring
    ],
)
def test_evaluate_measures_a_clt_or_with_a_model_its_replacement(options: list[str], said: str):
    command = [sys.executable, str(REPOSITORY / "evaluate.py"), *options]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode == 2 and said in ended.stdout + ended.stderr
