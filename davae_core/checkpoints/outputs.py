"""Where commands may write: nothing that they read is replaced, and nothing else that is there unless it is said so."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import WriteError
from .opening import Opened


def read_from(opened: Opened | None) -> list[Path]:
    """The files with weights that an opened file or folder was read from; none for None."""
    return [file for file in (opened.path, *opened.sources) if file.is_file()] if opened else []


def below(place: Path) -> list[Path]:
    """The files in a folder, or the file itself."""
    return [file for file in place.glob("*") if file.is_file()] if place.is_dir() else [place]


def check(paths: Iterable[Path], inputs: Iterable[Path], overwrite: bool) -> None:
    """To be called before any work, with everything that will be written.

    Args:
        paths: the files to write.
        inputs: the files that are read; a path that leads to one of them, by links too, is refused always.
        overwrite: other files may be replaced.

    Raises:
        WriteError: something would be replaced that is not to be, or a folder is in the way.
    """
    paths, inputs = list(paths), [file for file in inputs if file.exists()]
    for path in paths:
        if path.is_dir():
            raise WriteError(f"{path} is a folder, expected the name of a file to write; name another")
        if source := next((file for file in inputs if path.exists() and path.samefile(file)), None):
            raise WriteError(f"{path} would replace {source}, which is read here; name another file to write")
    there = [str(path) for path in paths if path.exists() or path.is_symlink()]
    if there and not overwrite:
        raise WriteError(
            f"{', '.join(there)} {'is' if len(there) == 1 else 'are'} there already; name another place, or give "
            "--overwrite to replace"
        )
