"""Files that are whole or not there: written under a temporary name, flushed, then moved. Folders with one writer."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cltjax.errors import UserError

UNLOCKABLE = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)  # file systems without flock


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in here that names no file (a full disk) names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def temporary_name(name: str) -> str:
    """What a file is called until it is whole; one that is killed leaves it behind."""
    return f".{name}.tmp"


def write_whole(path: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place.

    Without `sync` the file survives the death of this process, though not of the machine: for what can be made again.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        with naming(path):
            write(temporary)
            if sync:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, whole or not there."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to write into. It becomes `path` at the end, or goes where something is raised.

    UserError where `path` exists already.
    """
    if path.exists():
        raise UserError(f"{path} exists already: name another --out, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Lock:
    """The right to write into a folder, of one process at a time. It goes with the process, however that ends."""

    def __init__(self, folder: Path, who: str) -> None:
        """UserError where another process has it; `who` is "another capture" and the like."""
        self.descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise UserError(f"{who} is writing {folder}: wait for it, or choose another folder") from error
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                self.close()
                raise

    def close(self) -> None:
        """Give it up; more than once does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
