"""Whether a run may go on from a state: with the same settings, made from the same things, or with chosen changes."""

import difflib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import DAVAEError
from . import state as states
from .config import IMAGES, RunConfig, differences, without_folders
from .origins import replaced

logger = logging.getLogger(__name__)


def found(run: RunConfig) -> states.State | None:
    """The header of the state that the run goes on from; None where it begins.

    Raises:
        DAVAEError: there is a run in the folder, and this one is not to go on with it; or changes are named of a run
            that begins.
        CheckpointError: the state is damaged.
    """
    there = (run.out / states.FILE).exists()
    if there and not run.resume:
        raise DAVAEError(
            f"{run.out} holds the state of a run: go on with it (--run.resume), or choose another folder (--run.out)"
        )
    if run.change and not run.resume:
        raise DAVAEError("--run.change names what differs from the run that goes on: give --run.resume too")
    if run.resume and not there:
        logger.info("there is nothing to resume in %s: the run starts from the beginning", run.out)
    return states.load_header(run.out) if there else None


def changes(
    saved: states.State, recipe: Mapping[str, Any], origins: Mapping[str, states.Origin], run: RunConfig
) -> tuple[str, ...]:
    """What is changed on purpose, one line each.

    Args:
        saved: the state that the run goes on from.
        recipe: the flat settings of now.
        origins: what they name now.
        run: tells what may be changed.

    Raises:
        DAVAEError: something else has changed, or there is no setting of a name that may be changed.
    """
    _check_names(run.change, {*saved.recipe, *recipe, *origins})
    before = saved.about.origins
    lines = _lines(differences(saved.recipe, recipe), before, origins)
    refused = {name: line for name, line in lines.items() if not _covered(name, run.change)}
    if refused:
        raise DAVAEError(
            f"the run in {run.out} was made with other settings, so this would not be the same run: "
            f"{'; '.join(refused.values())}. Use the old settings, or another folder (--run.out), or name what you "
            f"change on purpose: --run.resume --run.change {' '.join([*run.change, *refused])}"
        )
    # These lines go into the files.
    short = _lines(differences(without_folders(saved.recipe), without_folders(recipe)), before, origins)
    return tuple(f"from step {saved.step} on, {short.get(name, f'{name}: elsewhere')}" for name in lines)


def _lines(
    settings: Mapping[str, str], before: Mapping[str, states.Origin], now: Mapping[str, states.Origin]
) -> dict[str, str]:
    """What has changed, by name: settings, and files, folders and images by what they hold instead of where they lie.

    Args:
        settings: lines about them.
        before, now: what they name.
    """
    known = (before.keys() & now.keys()) - {IMAGES}  # of images the settings are said beside what is there
    lines = {name: line for name, line in settings.items() if name not in known}
    for name, line in replaced(before, now).items():
        lines[name] = f"{lines[name]}; {line}" if name in lines else line
    return lines


def _covered(name: str, allowed: Iterable[str]) -> bool:
    """Whether a setting, or a group that it is in, is among those that may change."""
    return any(name == one or name.startswith(f"{one}.") for one in map(_plain, allowed))


def _plain(name: str) -> str:
    """``--optimiser.weight-decay`` as ``optimiser.weight_decay``."""
    return name.lstrip("-").replace("-", "_").rstrip(".")


def _check_names(allowed: Iterable[str], known: Iterable[str]) -> None:
    for name in allowed:
        if not any(_covered(setting, [name]) for setting in known):
            near = difflib.get_close_matches(_plain(name), list(known), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise DAVAEError(f"there is no setting {name} to change (--run.change){hint}")


def where(folder: Path, step: int) -> str:
    """How to go on from a state."""
    return f"the state of step {step} is in {folder}: --run.resume goes on from it"
