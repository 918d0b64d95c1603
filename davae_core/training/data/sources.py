"""Which images the entries of --data.images stand for: files in folders, and members of WebDataset shards.

Listing reads captions and no picture.
"""

import glob
import logging
import os
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from ...errors import DAVAEError
from . import entries, folders, shards
from .listing import DamagedShardError, Listing, Source
from .pictures import ENDINGS

BRACES = re.compile(r"\{([^{}]*)\}")

logger = logging.getLogger(__name__)


def find(images: Iterable[str], out: Path | None = None) -> Listing:
    """All images of folders and shards; entries in the given order, each sorted by path.

    Args:
        images: folders, searched recursively, and WebDataset shards: ``*.tar``, with globs and braces
            (``train-{000..012}.tar``); each may have settings, see :mod:`davae_core.training.data.entries`.
        out: folder of the run; images in it are left out.

    Captions are read from the ``.txt``, ``.caption`` or ``.json`` of the same name; see
    :func:`davae_core.caption_files.read`. A shard that is cut short or damaged is left out, whole, with a
    warning.

    Raises:
        DAVAEError: an entry does not exist or holds no images; a shard is compressed; all shards are damaged.
    """
    listing = Listing()
    damaged: list[DamagedShardError] = []
    for text in images:
        entry = entries.parse(text)
        for path in _paths(entry.place):
            before = len(listing.sources) + len(listing.unreadable)
            try:
                if path.is_dir():
                    folders.listed(path, entry, out, listing)
                else:
                    shards.listed(path, entry, listing)
            except DamagedShardError as problem:
                damaged.append(problem)
                listing.leave_out("a shard that is cut short or damaged", str(path))
                continue
            if len(listing.sources) + len(listing.unreadable) == before:
                raise DAVAEError(_nothing(path, listing))
    for one in damaged:
        logger.warning("%s. The training goes on without its images", one)
    if damaged and not listing.sources:
        raise damaged[0]
    if not listing.sources and not listing.unreadable:
        raise DAVAEError("there are no images to train on: give a folder or WebDataset shards (--data.images)")
    return listing


def index(images: Iterable[str]) -> list[Source]:
    """The images of :func:`find`; what cannot be read of their captions is logged."""
    listing = find(images)
    for name, why in listing.unreadable.items():
        logger.warning("%s is left out: %s", name, why)
    return listing.sources


def _nothing(path: Path, listing: Listing) -> str:
    """Why a folder or shard has no images to train on."""
    kinds = ", ".join(sorted(ENDINGS))
    if not path.is_dir():
        return f"the shard {path} holds no images ({kinds})"
    here = f"{path}{os.sep}"
    if any(name.startswith(here) for name in listing.left_out.get(folders.RUN, [])):
        return (
            f"the images in {path} lie in the folder of a run, which a run does not train on: give the folder of the "
            "photographs (--data.images), or another folder for the run (--run.out)"
        )
    others = sorted({os.path.splitext(n)[1].lower() for names in listing.left_out.values() for n in names} - {""})
    hint = f"; for the shards in it give {path / '*.tar'}" if ".tar" in others else ""
    seen = f"; it has {', '.join(others[:8])}" if others and not hint else ""
    return f"the folder {path} holds no images ({kinds}){seen}{hint}"


def _paths(place: str) -> list[Path]:
    """The folders and shards that a place stands for; what is there by its literal name is no pattern."""
    whole = os.path.expanduser(place)
    if os.path.exists(whole):
        return [Path(whole)]
    literal = next((str(parent) for parent in Path(whole).parents if parent.exists()), "")
    rest = os.path.relpath(whole, literal) if literal else whole
    return [path for pattern in _braces(rest) for path in _matches(Path(literal), pattern, place)]


def _braces(pattern: str) -> list[str]:
    """``a{00..02}`` to ``a00``, ``a01``, ``a02``; ``{x,y}`` to ``x`` and ``y``."""
    pieces = BRACES.split(pattern)
    return ["".join(choice) for choice in product(*[_choices(p) if i % 2 else [p] for i, p in enumerate(pieces)])]


def _choices(inside: str) -> list[str]:
    """What braces around ``inside`` stand for."""
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not span:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = span.groups()
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _matches(folder: Path, pattern: str, place: str) -> list[Path]:
    """The folders and shards of one pattern in a folder."""
    literal = folder / pattern
    paths = [literal] if literal.exists() else [folder / path for path in sorted(glob.glob(pattern, root_dir=folder))]
    if not paths:
        what = "no file matches" if glob.has_magic(pattern) else "there is no"
        raise DAVAEError(f"{what} {literal} (from --data.images {place}); give a folder of images or WebDataset shards")
    return paths
