"""The images of a folder, with what lies beside them."""

import os
from collections.abc import Iterator
from pathlib import Path

from ... import caption_files
from ...errors import DAVAEError
from .entries import Entry
from .listing import STATE, Listing, Source, in_threads
from .pictures import ENDINGS

HIDDEN, TWICE, RUN = "hidden", "a folder that was searched already", "in the folder of a run"
ALONE = "a caption without an image"


def listed(folder: Path, entry: Entry, out: Path | None, listing: Listing) -> None:
    """Add the images of a folder, and of the folders in it, to ``listing``.

    Args:
        folder: where to look. Hidden files and folders are left out.
        entry: what holds for the images.
        out: the folder of the run, whose sheets are no images to train on; nor are those of any other run.
        listing: what is added to.
    """
    start = len(listing.sources)
    found = list(_pictures(folder, out, listing))
    for source, problem, encoding in in_threads(lambda one: _source(*one, entry), found):
        if problem:
            listing.unreadable[source.name] = problem
            continue
        listing.sources.append(source)
        if encoding != caption_files.UTF8:
            listing.note(f"caption in {encoding}", source.name)
    listing.sources[start:] = sorted(
        listing.sources[start:], key=lambda source: Path(source.name).relative_to(folder).as_posix()
    )


def _pictures(folder: Path, out: Path | None, listing: Listing) -> Iterator[tuple[str, dict[str, str]]]:
    """The path of each picture, and those of its captions by ending."""
    seen: set[str] = set()
    runs: list[str] = [os.path.realpath(out)] if out else []
    if (folder.resolve().parent / STATE).is_file():  # its samples/
        runs.append(os.path.realpath(folder.resolve().parent))
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            listing.leave_out(TWICE, parent)
            folders.clear()
            continue
        seen.add(real)
        if STATE in names:
            runs.append(real)
        for name in [name for name in folders if name.startswith(".")]:
            listing.leave_out(HIDDEN, os.path.join(parent, name))
            folders.remove(name)
        inside = any(os.path.commonpath((real, run)) == run for run in runs if _one_drive(real, run))
        captions: dict[tuple[str, str], str] = {}
        shown = []
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if name.startswith("."):
                listing.leave_out(HIDDEN, os.path.join(parent, name))
            elif ending.lower() in caption_files.ENDINGS:
                captions.setdefault((stem, ending.lower()), name)
            else:
                shown.append((name, stem, ending))
        used = set()
        for name, stem, ending in shown:
            path = os.path.join(parent, name)
            if ending.lower() not in ENDINGS:
                listing.leave_out(f"ending {ending.lower() or '(none)'}", path)
            elif inside:
                listing.leave_out(RUN, path)
            else:
                mine = {e: captions[stem, e] for e in caption_files.ENDINGS if (stem, e) in captions}
                yield path, {e: os.path.join(parent, caption) for e, caption in mine.items()}
            used.add(stem)
        for (stem, _), name in captions.items():
            if stem not in used:
                listing.leave_out(ALONE, os.path.join(parent, name))


def _one_drive(one: str, other: str) -> bool:
    """Whether two absolute paths have a common beginning at all: on Windows they may not."""
    return os.path.splitdrive(one)[0].lower() == os.path.splitdrive(other)[0].lower()


def _source(path: str, beside: dict[str, str], entry: Entry) -> tuple[Source, str, str]:
    """A picture with its captions; what is wrong with these, or ""; and their encoding."""
    try:
        content = {ending: Path(file).read_bytes() for ending, file in beside.items()}
        captions = caption_files.read(content, path)
    except (OSError, DAVAEError) as problem:
        return Source(path, path), str(problem), caption_files.UTF8
    source = Source(
        path,
        path,
        captions=entry.captions(captions.texts),
        captioned=bool(captions.texts),
        repeats=entry.repeats,
        side=entry.size,
    )
    return source, "", captions.encoding
