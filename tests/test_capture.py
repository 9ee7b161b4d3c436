"""The capture as a user runs it: a process that may be killed, and one-line answers to mistakes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = "examples/shapes/model"


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "capture/run.py", "--model", DEMO, "--out", str(out), *options]


def run(out: Path, *options: str) -> subprocess.CompletedProcess:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command(out, *options), cwd=ROOT, capture_output=True, text=True, check=False, env=offline)


def digests(folder: Path) -> dict[str, str]:
    """Every file below `folder` and its content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def published(out: Path) -> int:
    manifest = out / "manifest.json"
    return json.loads(manifest.read_text())["rows"] if manifest.exists() else 0


def shard_files(out: Path, shards: int) -> dict[str, tuple[int, int]]:
    """Identity and time of every file of the first `shards` shards: `ARRAY/c/SHARD` or `ARRAY/c/SHARD/0/0`."""
    files = (path for name in ("*/c/*", "*/c/*/*", "*/c/*/*/*") for path in out.glob(name) if path.is_file())
    return {
        str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in files
        # what is being written lies beside it as SHARD.__lock
        if (shard := path.relative_to(out).parts[2]).isdecimal() and int(shard) < shards
    }


def kill_and_resume(tmp_path: Path, samples: int, shard_rows: int, kills: int, *options: str) -> None:
    """Killed `kills` times while it writes and started again each time: the same bytes as never killed."""
    options = ("--max-samples", str(samples), "--shard-rows", str(shard_rows), "--batch-size", "8", *options)
    whole = tmp_path / "whole"
    assert run(whole, *options).returncode == 0
    rows = published(whole)
    assert rows >= 10 * shard_rows

    out = tmp_path / "killed"
    rng = random.Random(0)
    before: dict[str, tuple[int, int]] = {}
    rows_before = killed = 0
    for kill in range(kills):
        goal = rows * (kill + 1) // (kills + 2)
        process = subprocess.Popen(command(out, *options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and published(out) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        now = published(out)
        assert now >= rows_before
        after = shard_files(out, now // shard_rows)
        assert len(after) == now // shard_rows * len(list(out.glob("*/zarr.json")))
        for name, identity in before.items():
            assert after[name] == identity, f"{name} was published and then rewritten"
        before = after
        rows_before = now
    assert killed == kills, "the capture was over before it could be killed: more samples are needed"
    finished = run(out, *options)
    assert finished.returncode == 0, finished.stderr
    assert digests(out) == digests(whole)
    again = run(out, *options)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_killed_and_resumed_is_the_same_as_never_killed(tmp_path: Path):
    kill_and_resume(tmp_path, samples=700, shard_rows=1024, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--generate", "5", "--image-tokens", "0.5", "--dtype", "int8")])
def test_killed_ten_times(tmp_path: Path, options: tuple[str, ...]):
    kill_and_resume(tmp_path, 1500, 2048 if not options else 1024, 10, *options)


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_mistakes_get_one_line_and_status_2(tmp_path: Path):
    query = tmp_path / "query.json"
    query.write_text('[{"id": 1, "image": "x.jpg", "query": "What?"},')
    assert f"{query}, line 1: not JSON" in one_line(run(tmp_path / "a", "--dataset", str(query)))
    missing = one_line(run(tmp_path / "a", "--model", "nobody/nothing-here"))
    assert "nobody/nothing-here" in missing
    assert DEMO in missing
    assert not (tmp_path / "a").exists()


def test_another_capture_in_the_same_folder_is_refused(tmp_path: Path):
    options = ("--max-samples", "5")
    assert run(tmp_path / "a", *options).returncode == 0
    whole = digests(tmp_path / "a")
    line = one_line(run(tmp_path / "a", *options, "--site", "resid_mid"))
    assert "site" in line
    assert "resid_mid" in line
    assert digests(tmp_path / "a") == whole
