"""What a training is going to see: the images that are taken, those held out, and what is left out and why."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import atomic
from ...errors import DAVAEError
from . import cutting
from .config import DataConfig
from .listing import Listing, Source, examined, in_threads
from .sources import find

FILE, EXAMPLES = "data.json", 3
SMALL = "smaller than the training's size (--data.enlarge takes them)"
UNREADABLE, HELD = "unreadable", "held out (--data.held-out)"

logger = logging.getLogger(__name__)


@dataclass
class Table:
    """What was found, in groups of a count and examples; the first line of each group is its sum.

    Attributes:
        lines: names by what they have in common. ``reasons`` are added to the names in what is shown.
    """

    found: int = 0
    taken: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """The table as JSON: counts, and for what is left out or odd some examples."""

        def short(group: Mapping[str, Sequence[str]]) -> dict[str, Any]:
            return {
                what: {"count": len(names), "examples": list(names[:EXAMPLES])}
                for what, names in sorted(group.items(), key=lambda one: (-len(one[1]), one[0]))
            }

        taken = {what: len(names) for what, names in self.taken.items()}
        return {"found": self.found, "taken": taken, "noted": short(self.noted), "left_out": short(self.left_out)}

    def save(self, folder: Path) -> Path:
        """Write it as ``data.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        atomic.write(path, json.dumps(self.told(), indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        return path

    def __str__(self) -> str:
        told = self.told()
        rows = [("images found", self.found, "")]
        rows += [(f"  {what}", count, "") for what, count in told["taken"].items()]
        for title, group in (("noted", told["noted"]), ("left out", told["left_out"])):
            for what, line in group.items():
                rows.append((f"  {title}: {what}", line["count"], "; ".join(line["examples"])))
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}} {count:>9,}  {shown}".rstrip() for name, count, shown in rows)


@dataclass(frozen=True)
class Collection:
    """The images of a training.

    Attributes:
        shapes: (width, height) that images are cut to.
        sources: those to train on.
        bucket_of: index of the shape of each.
        held: those held out, in the order they are handed out.
        held_bucket_of: index of the shape of each.
        table: what was found.
    """

    shapes: list[tuple[int, int]]
    sources: list[Source]
    bucket_of: list[int]
    held: list[Source]
    held_bucket_of: list[int]
    table: Table


def collect(config: DataConfig, multiple: int, out: Path | None = None) -> Collection:
    """Find and look at all images of a training; reads their headers, no pixels.

    Args:
        config: the images.
        multiple: sides of images are multiples of it.
        out: folder of the run; images in it are left out.

    Raises:
        DAVAEError: a place has no images, none can be trained on, or more than ``max_broken`` cannot be read.
    """
    listing = find(config.images, out)
    readable, aside = _readable(listing), []
    if config.held_folders:
        apart = find(config.held_folders, out)
        aside = _readable(apart)
        listing.add(apart)
    shapes, of_side = _shapes(config, multiple, {source.side for source in [*readable, *aside]})
    named = {source.name for source in [*readable, *aside]} | listing.unreadable.keys()
    table = Table(len(named), noted=listing.noted)
    check_readable(config, listing, table.found)
    small: dict[str, Source] = {}

    def fitting(among: Sequence[Source]) -> tuple[list[Source], list[int]]:
        kept, buckets = [], []
        for source in among:
            mine = of_side[source.side]
            bucket = mine[cutting.nearest_shape(source.size, [shapes[i] for i in mine])]
            if config.enlarge or not cutting.is_enlarged(source.size, shapes[bucket]):
                kept.append(source)
                buckets.append(bucket)
            else:
                small[source.name] = source
        return kept, buckets

    large, _ = fitting(readable)
    held = _held(config, large, aside)
    identities = {source.identity for source in held}
    sources, bucket_of = fitting([source for source in large if source.identity not in identities])
    held, held_bucket_of = fitting(held)
    for source in small.values():
        listing.leave_out(SMALL, f"{source.name} ({source.size[0]} x {source.size[1]})")
    leave_out_unreadable(listing)
    for source in large:
        if source.identity in identities:
            listing.leave_out(HELD, source.name)
    table.left_out = listing.left_out
    for source in _copies(sources):
        listing.note("the same picture as another", source.name)
    table.taken = {
        "to train on": [source.name for source in sources],
        "with a caption": [source.name for source in sources if source.captioned],
        "without a caption": [source.name for source in sources if not source.captioned],
        "held out": [source.name for source in held],
    }
    if len(of_side) > 1:
        for side in sorted(of_side):
            name = f"cut to {side or config.size} px"
            table.taken[name] = table.taken.get(name, []) + [one.name for one in sources if one.side == side]
    if not sources:
        raise DAVAEError(f"none of the images can be trained on at a size of {config.size}:\n{table}")
    return Collection(shapes, sources, bucket_of, held, held_bucket_of, table)


def _shapes(config: DataConfig, multiple: int, sides: set[int]) -> tuple[list[tuple[int, int]], dict[int, list[int]]]:
    """The shapes of all sizes; and for each size that entries name, or 0, which of them it has.

    Raises:
        DAVAEError: a size cannot be, or is larger than the training's.
    """
    if config.size < max(sides, default=0):
        raise DAVAEError(
            f"a folder asks for a size of {max(sides)}, --data.size is {config.size}; give the largest size as "
            "--data.size, for which memory is planned"
        )
    own = {side: cutting.shapes(side or config.size, multiple, config.buckets) for side in sorted(sides | {0})}
    shapes = list(dict.fromkeys(shape for some in own.values() for shape in some))
    return shapes, {side: [shapes.index(shape) for shape in some] for side, some in own.items() if side in sides}


def _readable(listing: Listing) -> list[Source]:
    """The images with their sizes; moves the others to what is unreadable."""
    readable = []
    for source, seen in zip(listing.sources, in_threads(examined, listing.sources, "looking at images"), strict=True):
        if isinstance(seen, str):
            listing.unreadable[source.name] = seen
        else:
            readable.append(seen)
    return readable


def check_readable(config: DataConfig, listing: Listing, found: int) -> None:
    """Name the images that cannot be read; raise DAVAEError where they are too many of those ``found``."""
    broken = listing.unreadable
    for name, why in broken.items():
        logger.warning("could not read %s: %s", name, why)
    if len(broken) > config.max_broken or len(broken) == found:
        raise DAVAEError(too_many(broken, found))


def leave_out_unreadable(listing: Listing) -> None:
    """Count the images that cannot be read among what is left out."""
    for name, why in listing.unreadable.items():
        listing.leave_out(UNREADABLE, f"{name}: {why}")


def too_many(broken: Mapping[str, str], found: int) -> str:
    """The message for more unreadable images than are allowed."""
    named = "; ".join(f"{name}: {why}" for name, why in sorted(broken.items()))
    return (
        f"{len(broken)} of {found} images could not be read: {named}. Repair or remove them, or allow more "
        "(--data.max-broken)"
    )


def _held(config: DataConfig, found: Sequence[Source], aside: Sequence[Source]) -> list[Source]:
    """The images to hold out: those of folders, or a share of all by their content."""
    return held_share(config, found) if config.held_share else list(aside)


def held_share(config: DataConfig, found: Sequence[Source]) -> list[Source]:
    """The share of all that is held out (``config.held_share``), by its content; at least one."""
    order = sorted(found, key=lambda source: (source.identity, source.name))
    bound = int(config.held_share * (1 << 32))
    held = [source for source in order if int(source.identity[:8], 16) < bound]
    return held or order[:1]


def _copies(sources: Sequence[Source]) -> list[Source]:
    """Images that are the same as an earlier one of the same size."""
    seen: set[tuple[str, int]] = set()
    keys = ((source, (source.identity, source.side)) for source in sources)
    return [source for source, key in keys if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
