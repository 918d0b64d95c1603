"""The folder of a run: one run in it at a time, and nothing left of one that never began."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ... import atomic
from ...errors import DAVAEError, WriteError
from ...lock import holding
from . import state as states

LOCK, CONFIG = ".lock", "config.json"

logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, no other run may use the folder. It is made, and removed where nothing is left in it.

    A run that has ended, however, claims nothing.

    Raises:
        DAVAEError: another run uses it.
        WriteError: it cannot be made or written to.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).open("ab").close()
    except OSError as problem:
        raise WriteError(
            f"{folder} cannot be the folder of a run ({problem}); may you write there? --run.out names another"
        ) from problem
    try:
        with _lock(folder):
            try:
                yield
            finally:
                with suppress(OSError):
                    (folder / LOCK).unlink()
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()  # leaves it where there is anything in it


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        lock = holding(folder / LOCK)
        free = lock.__enter__()
    except OSError as problem:
        logger.warning("%s cannot be locked (%s): see to it that no other run uses it", folder, problem)
        yield
        return
    try:
        if not free:
            raise DAVAEError(
                f"another run is at work in {folder}: wait for its end, stop it, or choose another folder (--run.out)"
            )
        yield
    finally:
        lock.__exit__(None, None, None)


def write_config(folder: Path, about: states.About, told: Mapping[str, Any]) -> None:
    """Write the whole settings of a run, with what it was made from, as ``config.json``.

    Raises:
        WriteError: it cannot be written.
    """
    content = {
        "stage": about.stage,
        "recipe": about.recipe,
        **told,
        "made_from": {name: f"{origin.about} ({origin.hash})" for name, origin in about.origins.items()},
        "changes": list(about.changes),
        "settings": about.settings,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Of a name that is not UTF-8 each such byte becomes \udcXX, which JSON reads as Python holds it.
    atomic.write(folder / CONFIG, text.encode("utf-8", "backslashreplace"))


def checkpoint(folder: Path, step: int) -> Path:
    """The folder of the checkpoint that stays of a step."""
    return folder / f"step_{step:07d}"


def keep_state(folder: Path, step: int) -> None:
    """Give the checkpoint of a step a copy of the state that was saved at it.

    No link: people copy a checkpoint's state over that of the run, which would write into the other checkpoint's.

    Raises:
        WriteError: it cannot be written.
    """
    with atomic.writing(checkpoint(folder, step) / states.FILE) as temporary:
        shutil.copyfile(folder / states.FILE, temporary)


def prune(folder: Path, last: int) -> None:
    """Remove the checkpoints but for the ``last`` that were written last, whatever their steps; none for 0."""
    kept = sorted(
        (path for path in folder.glob("step_*") if (path / states.FILE).is_file()),
        key=lambda path: ((path / states.FILE).stat().st_mtime_ns, path.name),
    )
    for path in kept[: -last or len(kept)] if last else ():
        shutil.rmtree(path, ignore_errors=True)
