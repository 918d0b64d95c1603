"""The images of WebDataset shards, with what belongs to them.

A shard's table of contents is read once, and its images by their place in the file: any can be had at any time.
"""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ... import caption_files
from ...errors import DAVAEError
from .entries import Entry
from .folders import ALONE, HIDDEN
from .listing import DamagedShardError, Listing, Source
from .pictures import ENDINGS

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_NAME = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
BLOCK = tarfile.BLOCKSIZE
REPLACED, SPARSE = "a member that a later one of the same name replaces", "a member that is stored with holes"
NOWHERE, FIELD = "a link to nothing in the shard", "another field of a sample that has an image"


@dataclass
class _Sample:
    """The members whose names are the same up to the first dot, by what comes after it (with the dot)."""

    fields: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def listed(path: Path, entry: Entry, listing: Listing) -> None:
    """Add the images of a shard to ``listing``, sorted by name.

    Raises:
        DamagedShardError: it is damaged or cut short.
        DAVAEError: it is compressed, or no tar file.
    """
    samples: dict[str, _Sample] = {}
    names = {}
    for name, member in _regular(path, listing).items():
        place, base = posixpath.split(name)
        if base.startswith("."):
            listing.leave_out(HIDDEN, f"{path}/{name}")
            continue
        stem, _, suffix = base.partition(".")
        key = posixpath.join(place, stem)
        samples.setdefault(key, _Sample()).fields["." + suffix] = member
        names[key, "." + suffix] = name
    with open(path, "rb") as file:
        for key in sorted(samples):
            sample = samples[key].fields
            for suffix, captions in _images(sample):
                image, name = sample[suffix], f"{path}/{names[key, suffix]}"
                if captions is None:
                    listing.leave_out(FIELD, name)
                    continue
                content = {}
                for ending, member in captions.items():
                    file.seek(member.offset_data)
                    content[ending] = file.read(member.size)
                try:
                    read = caption_files.read(content, name)
                except DAVAEError as problem:
                    listing.unreadable[name] = str(problem)
                    continue
                if read.encoding != caption_files.UTF8:
                    listing.note(f"caption in {read.encoding}", name)
                texts, own = entry.captions(read.texts), bool(read.texts)
                begin, length = image.offset_data, image.size
                listing.sources.append(Source(name, str(path), begin, length, texts, own, entry.repeats, entry.size))
            _leave_others_out(path, {names[key, suffix]: suffix for suffix in sample}, listing)


def _images(sample: dict[str, tarfile.TarInfo]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo] | None]]:
    """Suffix of each image of a sample, and its captions by ending; None for an image that is a field beside another.

    WebDataset's samples end at the first dot: ``a.jpg`` and ``a.txt``. A picture ``a.b.jpg`` is one of its own, with
    the caption ``a.b.txt``, unless there is an ``a.jpg`` and no such caption. The only picture of a sample may have
    the sample's caption ``a.txt``.
    """
    lower = {suffix.lower(): suffix for suffix in sample}
    images = sorted(suffix for suffix in sample if os.path.splitext("x" + suffix)[1].lower() in ENDINGS)
    plain = any(suffix.lower() in ENDINGS for suffix in images)
    for suffix in images:
        inner = os.path.splitext("x" + suffix)[0][1:]  # of .b.jpg: .b
        own = {e: sample[lower[f"{inner.lower()}{e}"]] for e in caption_files.ENDINGS if f"{inner.lower()}{e}" in lower}
        if inner and not own and plain:
            yield suffix, None
        elif inner and not own and len(images) == 1:
            yield suffix, {e: sample[lower[e]] for e in caption_files.ENDINGS if e in lower}
        else:
            yield suffix, own


def _leave_others_out(path: Path, suffixes: dict[str, str], listing: Listing) -> None:
    """Name the members of a sample that are neither an image nor a caption, and captions of a sample without image."""
    images = any(os.path.splitext(name)[1].lower() in ENDINGS for name in suffixes)
    for name in suffixes:
        ending = os.path.splitext(name)[1].lower()
        if ending in caption_files.ENDINGS:
            if not images:
                listing.leave_out(ALONE, f"{path}/{name}")
        elif ending not in ENDINGS:
            listing.leave_out(f"ending {ending or '(none)'}", f"{path}/{name}")


def _regular(path: Path, listing: Listing) -> dict[str, tarfile.TarInfo]:
    """Members that hold bytes, by name, links followed; of several of one name the last, as tar unpacks them."""
    files: dict[str, tarfile.TarInfo] = {}
    links: dict[str, str] = {}
    for member in _members(path):
        name = posixpath.normpath(member.name)
        if member.islnk():
            target = posixpath.normpath(member.linkname)
            if target in files:
                files[name] = files[target]
            else:
                links[name] = target
        elif member.issym():
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.issparse():
            listing.leave_out(SPARSE, f"{path}/{name}")
        elif member.isreg():
            if name in files:
                listing.leave_out(REPLACED, f"{path}/{name}")
            files[name] = member
    for name, target in links.items():
        for _ in range(len(links)):
            target = links.get(target, target)
        if target in files:
            files.setdefault(name, files[target])
        else:
            listing.leave_out(NOWHERE, f"{path}/{name}")
    return files


def _members(path: Path) -> list[tarfile.TarInfo]:
    """The table of contents of a plain tar file.

    Raises:
        DamagedShardError: it is damaged or cut short.
        DAVAEError: it is compressed, or no tar file.
    """
    with open(path, "rb") as file:
        start = file.read(BLOCK)
        packed = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), "")
        if packed or COMPRESSED_NAME.search(path.name):
            raise DAVAEError(
                f"{path} is compressed{f' with {packed}' if packed else ''}: its images cannot be reached one by one. "
                "Unpack it to a plain .tar (the images in it are compressed already)"
            )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members, end = tar.getmembers(), tar.offset
        except tarfile.ReadError as problem:
            if path.suffix.lower() != ".tar":
                raise DAVAEError(f"{path} is neither a folder nor a WebDataset shard (.tar)") from None
            raise DamagedShardError(f"the shard {path} is cut short or damaged ({problem}); write it again") from None
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise DamagedShardError(f"the shard {path} is cut short or damaged at byte {end:,}; write it again")
    return members
