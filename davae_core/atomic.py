"""Files and folders that appear whole or not at all: written aside, then put in place in one step."""

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import WriteError
from .lock import holding

PART, LOCK = ".part", ".lock"
NEW_SECONDS = 60


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what becomes the file ``path`` when the block ends without an error, and is gone when it does not.

    Raises:
        WriteError: it cannot be written.
    """
    path = Path(path)
    with _aside(path) as folder:
        # A folder, because safetensors too writes to a file of another name first, and leaves that when it is killed.
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Where to write what becomes the folder ``path`` when the block ends without an error.

    Raises:
        WriteError: there is something at that place already, or it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WriteError(f"{path} is there already; name a new folder")
    with _aside(path) as folder:
        inner = folder / path.name
        inner.mkdir()
        yield inner
        if path.exists():
            path.rmdir()
        os.replace(inner, path)


def write(path: Path, data: bytes) -> None:
    """Replace a file's content.

    Raises:
        WriteError: it cannot be written.
    """
    with writing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for the time of writing; those that killed writers left are removed."""
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        folder = Path(tempfile.mkdtemp(PART, f".{path.name}.", path.parent))
        with holding(folder / LOCK):
            yield folder
    except OSError as problem:
        raise WriteError(
            f"{path} could not be written ({problem}); is there room, and may you write there?"
        ) from problem
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what writers of ``path`` that were killed left; a live one holds its folder's lock."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*{PART}"):
        # A folder without its lock is one that is being made, unless it is old.
        if (folder / LOCK).exists():
            with holding(folder / LOCK) as dead:
                pass
        else:
            dead = folder.is_dir() and time.time() - folder.stat().st_mtime > NEW_SECONDS
        if dead:
            shutil.rmtree(folder, ignore_errors=True)
