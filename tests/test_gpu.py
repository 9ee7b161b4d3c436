"""The one command for a GPU: parts that fail or hang do not take the others with them."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, ROOT, Part, run_all

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def python(code: str) -> list[str]:
    return ["-c", code]


def test_each_part_ends_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture):
    parts = [
        Part("two", 60, lambda out, work: [python("print('first')"), python("print('second')")]),
        Part("fails", 60, lambda out, work: [python("print('so'); raise SystemExit(3)"), python("print('never')")]),
        Part("hangs", 5, lambda out, work: [python(HANGS)]),
        Part("last", 60, lambda out, work: [python(f"open({str(out / 'found')!r}, 'w').write({str(work)!r})")]),
    ]
    began = time.monotonic()
    assert not run_all(parts, tmp_path / "results", seconds=60)
    assert time.monotonic() - began < 40
    summary = (tmp_path / "results/summary.txt").read_text().splitlines()
    assert summary == capsys.readouterr().out.splitlines()
    ended = dict(line.split(": ", 1) for line in summary[2:])
    assert list(ended) == ["two", "fails", "hangs", "last"]
    assert ended["two"].startswith("done in ") and ended["last"].startswith("done in ")
    assert ended["fails"].startswith("status 3 after ") and ended["hangs"] == "stopped after 5 s"
    two, fails, hangs = ((tmp_path / f"results/{name}.txt").read_text() for name in ("two", "fails", "hangs"))
    assert [line for line in two.splitlines() if not line.startswith("$")] == ["first", "second"]
    assert "so\n" in fails and "\nnever" not in fails
    (child,) = re.findall(r"^child (\d+)$", hangs, re.MULTILINE)
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()  # what a part started is gone too
    assert not Path((tmp_path / "results/found").read_text()).exists()  # nor is its working folder left


def test_without_time_left_nothing_is_begun(tmp_path: Path):
    assert not run_all([Part("late", 60, lambda out, work: [python("print(1)")])], tmp_path, seconds=0)
    assert "late: not begun" in (tmp_path / "summary.txt").read_text()


def test_the_parts_are_commands_that_there_are(tmp_path: Path):
    """With one option that there is not: that is all they complain of."""
    for part in PARTS:
        for command in part.commands(tmp_path, tmp_path):
            asked = [sys.executable, *command, "--no-such"]
            said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"})
            assert said.returncode == 2
            (found,) = re.findall(r"(?i)unrecognized (?:options|arguments): (.*)", said.stderr + said.stdout)
            assert found.strip(" │") == "--no-such", command
    assert sum(part.limit for part in PARTS) < 600
