import errno
import fcntl
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cltjax import files
from cltjax.errors import UserError
from cltjax.files import Lock, delete_leftovers, reserved, whole_folder, write_json, write_whole


def test_json_is_read_back_and_leaves_nothing_beside_it(tmp_path: Path):
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("sync", [True, False])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, sync: bool):
    path = tmp_path / "a"
    write_whole(path, lambda temporary: temporary.write_text("old"), sync=sync)

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail, sync=sync)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_writer(tmp_path: Path):
    first = Lock(tmp_path, "another capture")
    with pytest.raises(UserError, match="another capture is writing"):
        Lock(tmp_path, "another capture")
    first.close()
    first.close()
    Lock(tmp_path, "another capture").close()


def test_two_folders_at_once_do_not_touch_each_other(tmp_path: Path):
    """The first that is done has the place; the other is refused in one line, and leaves nothing."""
    out = tmp_path / "clt"

    def both() -> None:
        with whole_folder(out) as slow:
            (slow / "a").write_text("slow")
            with whole_folder(out) as fast:
                assert fast != slow and fast.parent == slow.parent == tmp_path
                (fast / "a").write_text("fast")
            assert (slow / "a").read_text() == "slow"

    with pytest.raises(UserError, match="exists already: name another --out") as raised:
        both()
    assert "\n" not in str(raised.value)
    assert (out / "a").read_text() == "fast" and list(tmp_path.iterdir()) == [out]


def test_a_folder_is_whole_or_not_there(tmp_path: Path):
    def fail() -> None:
        with whole_folder(tmp_path / "clt") as temporary:
            (temporary / "a").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def aged(folder: Path, seconds: float) -> Path:
    """As if nothing had been done to it for so long."""
    then = time.time() - seconds
    os.utime(folder, (then, then))
    return folder


def test_what_a_killed_writer_left_goes_and_what_is_being_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def left(name: str, seconds: float = 3600) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a").write_text("half")
        return aged(folder, seconds)

    dead, young, others = left(".c[1].0123abcd.tmp"), left(".c[1].0123abce.tmp", 0), left(".c1.0123abcd.tmp")
    with whole_folder(tmp_path / "c[1]") as slow:
        assert not dead.exists() and young.exists() and others.exists()
        aged(slow, 3600)  # a large file takes long
        delete_leftovers(tmp_path / "c[1]")
        assert slow.exists()
    assert (tmp_path / "c[1]").is_dir() and not slow.exists() and capsys.readouterr().out == ""

    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr("fcntl.flock", without_locks)
    unknown = left(".other.0123abcd.tmp")
    with whole_folder(tmp_path / "other"):
        assert unknown.exists()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith(f"{unknown} is of another writer of {tmp_path / 'other'}")


def test_writers_of_a_file_wait_for_each_other(tmp_path: Path):
    """Whatever is read is one of them, whole: the first writer is in the middle when the others come."""
    path, begun, inside = tmp_path / "a", threading.Event(), []

    def write(temporary: Path, text: str) -> None:
        inside.append(text)
        assert len(inside) == 1
        with temporary.open("w") as file:
            for letter in text:
                file.write(letter)
                file.flush()
                begun.set()
                time.sleep(0.01)
        inside.remove(text)

    texts = [7 * letter for letter in "abcd"]
    with ThreadPoolExecutor(len(texts)) as pool:
        first = pool.submit(write_whole, path, lambda temporary: write(temporary, texts[0]), sync=False)
        begun.wait()
        (tmp_path / ".a.tmp").stat()  # where the others would write
        rest = [
            pool.submit(write_whole, path, lambda temporary, text=text: write(temporary, text), sync=False)
            for text in texts[1:]
        ]
        for one in (first, *rest):
            one.result()
            assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_who_waited_has_the_file_of_this_name_and_not_one_that_was_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, moved, real = tmp_path / ".a.tmp", [], files.lock

    def lock_late(descriptor: int, how: int) -> bool:
        if not moved:  # the one before moves its file into place just as its lock goes
            moved.append(path.rename(tmp_path / "a"))
        return real(descriptor, how)

    monkeypatch.setattr(files, "lock", lock_late)
    with reserved(path), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert moved


def test_a_file_that_a_killed_writer_left_is_written_over(tmp_path: Path):
    (tmp_path / ".a.tmp").write_text("half of what was to be a longer text")
    write_whole(tmp_path / "a", lambda temporary: temporary.write_text("whole"))
    assert (tmp_path / "a").read_text() == "whole" and [path.name for path in tmp_path.iterdir()] == ["a"]
