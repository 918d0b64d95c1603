"""A lock on a file that one process holds at a time, and that a process which has ended, however, does not hold.

Nor do the processes it forked, such as those that load images: they outlive one that was killed by seconds.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

if os.name == "nt":
    import msvcrt
else:
    import fcntl

_held: set[IO[bytes]] = set()


@contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Hold the lock inside the block; gives whether it was free.

    The file is made where it is missing, and stays unless the one who holds it removes it.

    Raises:
        OSError: the file cannot be opened for writing, or the file system knows no locks.
    """
    file = open(path, "ab+")  # noqa: SIM115
    while (free := _take(file.fileno())) and not _is(path, file.fileno()):  # removed between opening and taking it
        file.close()
        file = open(path, "ab+")  # noqa: SIM115
    with file:
        _held.add(file)
        try:
            yield free
        finally:
            _held.discard(file)
            if free and os.name == "nt":  # elsewhere closing the file is enough
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]


def _take(number: int) -> bool:
    """Take the lock of an open file, unless another open file has it."""
    try:
        if os.name == "nt":
            os.lseek(number, 0, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is(path: Path, number: int) -> bool:
    """Whether the file at ``path`` is the open one."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """In a forked process: close what belongs to the process it comes from, which goes on holding its locks."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
