"""What the command lines of this package share."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, DAVAEError


def run(main: Callable[[], object]) -> None:
    """Run a command; what is wrong with what it was given ends it with the message and status 1."""
    try:
        main()
    except DAVAEError as problem:
        sys.exit(f"error: {problem}")


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes ``folder`` when the block ends without an error, and is gone when it does not.

    Raises:
        CheckpointError: there is something at that place already, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already; name a new folder")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    except OSError as problem:
        raise CheckpointError(f"{folder} could not be written ({problem}); is there room?") from problem
    finally:
        shutil.rmtree(aside, ignore_errors=True)
