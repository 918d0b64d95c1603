"""Prompts for a training that draws its own pictures: out of text files, or the captions of images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ... import caption_files
from ...errors import DAVAEError
from . import entries, sources
from .config import DataConfig
from .listing import Listing, Source
from .survey import HELD, Collection, Table, check_readable, held_share, leave_out_unreadable

ENDING = ".txt"


def collect(config: DataConfig, multiple: int, out: Path | None = None) -> Collection:
    """The prompts of a training: the lines of text files, and the captions of images, which are not looked at.

    Args:
        config: text files, folders and shards, under ``images`` and ``held_out``; and the size of what is drawn.
        multiple: that size is a multiple of it.
        out: folder of the run; images in it are left out.

    Raises:
        DAVAEError: a file cannot be read or holds no prompt, there is none to train on, more captions than
            ``max_broken`` cannot be read, or aspect ratios are asked for.
    """
    if config.buckets:
        raise DAVAEError("prompts have no aspect ratio to cut to: leave out --data.buckets")
    if config.size % multiple:
        raise DAVAEError(f"--data.size {config.size} is not a multiple of {multiple}")
    listing = Listing()
    found, held = _prompts(config.images, config, out, listing), _prompts(config.held_folders, config, out, listing)
    count = len(found) + len(listing.unreadable)
    check_readable(config, listing, count)
    leave_out_unreadable(listing)
    if config.held_share:
        held = held_share(config, found)
    known = {source.identity for source in held}
    trained = [source for source in found if source.identity not in known]
    for source in found:
        if source.identity in known:
            listing.leave_out(HELD, source.name)
    if not trained:
        raise DAVAEError(f"there are no prompts to train on in {', '.join(config.images)}")
    taken = {"to train on": [source.name for source in trained], "held out": [source.name for source in held]}
    table = Table(count, taken, listing.noted, listing.left_out)
    shape = (config.size, config.size)
    return Collection([shape], trained, [0] * len(trained), held, [0] * len(held), table)


def _prompts(places: Sequence[str], config: DataConfig, out: Path | None, listing: Listing) -> list[Source]:
    """All prompts of some places, each as a source of the size that is drawn; what has no caption is left out."""
    found: list[Source] = []
    for text in places:
        entry = entries.parse(text)
        if entry.size:
            raise DAVAEError(f"{text!r} (--data.images): what is drawn has one size, --data.size; leave out size=")
        if is_text(entry):
            found += lines_of(entry)
            continue
        images = sources.find([text], out)
        found += [source for source in images.sources if source.caption]
        listing.add(images)
        for source in images.sources:
            if not source.caption:
                listing.leave_out("an image without a caption", source.name)
    size = (config.size, config.size)
    return [replace(source, size=size, identity=_identity(source.caption)) for source in found]


def is_text(entry: entries.Entry) -> bool:
    """Whether an entry is a text file of prompts."""
    return entry.place.lower().endswith(ENDING)


def lines_of(entry: entries.Entry) -> list[Source]:
    """The prompts of a text file, one a line; empty lines and those that begin with # are left out.

    Raises:
        DAVAEError: it cannot be read or holds no prompt.
    """
    try:
        text, _ = caption_files.decoded(Path(entry.place).expanduser().read_bytes())
    except (OSError, ValueError) as problem:
        raise DAVAEError(f"the prompts in {entry.place} cannot be read ({problem}) (--data.images)") from problem
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    kept = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not kept:
        raise DAVAEError(f"{entry.place} holds no prompts; write one a line (--data.images)")
    return [
        Source(
            f"{entry.place}:{number}",
            str(Path(entry.place).expanduser()),
            captions=entry.captions((line,)),
            captioned=True,
            repeats=entry.repeats,
        )
        for number, line in kept
    ]


def _identity(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Blank:
    """Stands for the latents of a training's images where it has none and draws its own.

    Attributes:
        shape: ``(c, h, w)`` of what is drawn.
    """

    shape: tuple[int, int, int]

    def __call__(self, key: str) -> torch.Tensor:
        """Zeros of that shape, whatever is asked for; they take no memory."""
        return torch.zeros(1).expand(self.shape)

    def fitted(self, found: Collection, config: DataConfig) -> Collection:
        """All prompts have one."""
        return found
