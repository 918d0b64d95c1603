"""A lock on a file that one process holds at a time, and that a process which has ended, however, does not hold."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if os.name == "nt":
    import msvcrt
else:
    import fcntl


@contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Hold the lock inside the block; gives whether it was free. The file is made where it is missing, and stays.

    Raises:
        OSError: the file cannot be opened for writing, or the file system knows no locks.
    """
    with open(path, "ab+") as file:
        free = _take(file.fileno())
        try:
            yield free
        finally:
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
