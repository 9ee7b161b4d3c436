"""Files and folders that are whole or not there: written under a temporary name beside the place, flushed, then moved.
Folders with one writer.

A process that is killed leaves what it was writing, hidden beside the place: `.NAME.tmp` of a file, `.NAME.<8 hex>.tmp`
of a folder. It does not pile up: the next write of the same file writes over it, the next of the same folder deletes it
where it is a minute old. Which of them is still being written is known by a lock, which goes with its process. Where
the file system has no locks, two processes must not write the same file at once, and a folder's leftovers are named,
for someone to delete.
"""

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cltjax.errors import UserError

UNLOCKABLE = (
    errno.EBADF,
    errno.ENOLCK,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
)  # file systems without flock
SETTLED = 60.0  # seconds; a folder that is made is locked in fewer


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
    """What a file is called until it is whole."""
    return f".{name}.tmp"


def write_whole(path: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place. Another writer of it is waited for.

    Without `sync` the file survives the death of this process, though not of the machine: for what can be made again.
    """
    temporary = path.with_name(temporary_name(path.name))
    with naming(path), reserved(temporary):
        try:
            write(temporary)
            if sync:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """The file `path`, made where it is not there, is this writer's alone, as soon as any other one is done."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor, fcntl.LOCK_EX)
            if not is_file(descriptor, path):  # what was waited for has been moved into place
                continue
            yield
            return
        finally:
            os.close(descriptor)


def is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def lock(descriptor: int, how: int) -> bool:
    """Lock an open file or folder; False where its file system has no locks."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, whole or not there."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to write into. It becomes `path` at the end, or goes where something is raised.

    UserError where `path` exists already, at the end too: of several writers at once the first that is done has it.
    """
    there = f"{path} exists already: name another --out, or delete it"
    if path.exists():
        raise UserError(there)
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_leftovers(path)
    temporary = path.with_name(temporary_name(f"{path.name}.{secrets.token_hex(4)}"))
    temporary.mkdir()
    own = Lock(temporary, "another process")
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if path.exists():
                raise UserError(there) from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        own.close()


def delete_leftovers(path: Path) -> None:
    """Delete what writers of the folder `path` that were killed have left; name what may be of one that is not."""
    for left in path.parent.glob(temporary_name(glob.escape(path.name) + "." + 8 * "[0-9a-f]")):
        try:
            if time.time() - left.stat().st_mtime < SETTLED:
                continue
            with closing(Lock(left, "another process")) as mine:
                if mine.held:
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    print(f"{left} is of another writer of {path}, or left of one: delete it if there is none")
        except (UserError, OSError):  # it is being written, or was; or is somebody else's
            continue


class Lock:
    """The right to write into a folder, of one process at a time. It goes with the process, however that ends."""

    def __init__(self, folder: Path, who: str) -> None:
        """UserError where another process has it; `who` is "another capture" and the like."""
        self.descriptor = os.open(folder, os.O_RDONLY)
        try:
            self.held = lock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise UserError(f"{who} is writing {folder}: wait for it, or choose another folder") from error
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Give it up; more than once does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
