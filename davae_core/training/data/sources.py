"""Where images and their captions lie: files in folders, and members of WebDataset shards.

Listing reads no pixels. A shard's table of contents is read once, and its images by their place in the file, so any
image can be had at any time.
"""

import glob
import io
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from PIL import Image, ImageOps

from ...checkpoints import foreign_json
from ...errors import DAVAEError
from ...images import on_white

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_NAME = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
BRACES = re.compile(r"\{([^{}]*)\}")
THREADS = 16
BLOCK = tarfile.BLOCKSIZE
ORIENTATION = 0x0112
# What Pillow raises for files that are no images, or damaged ones.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, Image.DecompressionBombError)

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")


class DamagedShardError(DAVAEError):
    """A shard is not whole."""


@dataclass(frozen=True)
class Source:
    """One image: where its bytes are, and what is said about it."""

    name: str
    """For people: the path, or shard/member."""
    file: str
    """The file that holds the bytes."""
    offset: int = 0
    """Where in the file they begin."""
    length: int | None = None
    """How many there are; None: to the end of the file."""
    captions: tuple[str, ...] = ()
    """Captions to choose from; may be empty."""

    @property
    def caption(self) -> str:
        """The first caption, or an empty one."""
        return self.captions[0] if self.captions else ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as shown (the EXIF orientation is considered); reads the header alone.

        Raises:
            one of UNREADABLE.
        """
        with Image.open(self.bytes() if self.length is not None else self.file) as image:
            # The method of PNG files would decode the image, to look for EXIF behind it.
            turned = Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size

    def bytes(self) -> io.BytesIO:
        """The encoded image.

        Raises:
            OSError: the file cannot be read.
        """
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(-1 if self.length is None else self.length))

    def open(self) -> Image.Image:
        """The image upright, in RGB, over white where it is transparent.

        Raises:
            one of UNREADABLE.
        """
        with Image.open(self.bytes()) as image:
            return on_white(ImageOps.exif_transpose(image))


def index(images: Iterable[str]) -> list[Source]:
    """All images of folders and shards; entries in the given order, each sorted by path.

    Args:
        images: folders, searched recursively, and WebDataset shards: ``*.tar``, with globs and braces
            (``train-{000..012}.tar``).

    Captions are read from the ``.txt`` or ``.json`` of the same name; see :func:`captions_of`. Hidden files are left
    out. A shard that is cut short or damaged is left out too, whole, with a warning.

    Raises:
        DAVAEError: an entry does not exist or holds no images; a shard is compressed; all shards are damaged; captions
            cannot be read.
    """
    found: list[Source] = []
    damaged: list[DamagedShardError] = []
    for entry in images:
        paths = [path for pattern in _braces(os.path.expanduser(entry)) for path in _matches(pattern, entry)]
        for path in paths:
            try:
                found += _folder(path) if path.is_dir() else _shard(path)
            except DamagedShardError as problem:
                damaged.append(problem)
    for one in damaged:
        logger.warning("%s. The training goes on without its images", one)
    if damaged and not found:
        raise damaged[0]
    if not found:
        raise DAVAEError("there are no images to train on: give a folder or WebDataset shards (--data.images)")
    return found


def sizes(sources: Sequence[Source]) -> list[tuple[int, int] | None]:
    """Width and height of each image from its header; None where that cannot be read."""

    def size(source: Source) -> tuple[int, int] | None:
        try:
            return source.size
        except UNREADABLE:
            return None

    return _in_threads(size, sources)


def captions_of(text: bytes | None, data: bytes | None, name: str) -> tuple[str, ...]:
    """The captions of an image.

    Args:
        text: content of the ``.txt``: one caption.
        data: content of the ``.json``: an object whose ``caption`` is a caption or a list of them, or such a list.
            Used where there is no text.
        name: of the image, for errors.
    """
    try:
        if text is not None:
            return tuple(filter(None, [text.decode("utf-8-sig").strip()]))
        value: Any = foreign_json.value(data.decode("utf-8-sig"), "its .json") if data is not None else None
    except ValueError as problem:
        raise DAVAEError(f"the caption of {name} cannot be read ({problem}); .txt and .json must be UTF-8") from None
    if isinstance(value, dict):
        value = value.get("caption")
    listed = value if isinstance(value, list) else [value]
    return tuple(caption.strip() for caption in listed if isinstance(caption, str) and caption.strip())


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


def _matches(pattern: str, entry: str) -> list[Path]:
    """The folders and shards of one pattern."""
    paths = [Path(pattern)] if os.path.exists(pattern) else [Path(path) for path in sorted(glob.glob(pattern))]
    if not paths:
        what = "no file matches" if glob.has_magic(pattern) else "there is no"
        raise DAVAEError(f"{what} {pattern} (from --data.images {entry}); give a folder of images or WebDataset shards")
    return paths


def _folder(folder: Path) -> list[Source]:
    """The images of a folder and of the folders in it."""
    files: set[Path] = set()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files.update(Path(parent, name) for name in names if not name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        shards = any(path.suffix == ".tar" for path in files)
        hint = f"; for the shards in it give {folder / '*.tar'}" if shards else ""
        raise DAVAEError(f"the folder {folder} holds no images ({', '.join(sorted(SUFFIXES))}){hint}")

    def source(path: Path) -> Source:
        text, data = (
            beside.read_bytes() if beside in files else None
            for beside in (path.with_suffix(".txt"), path.with_suffix(".json"))
        )
        return Source(str(path), str(path), captions=captions_of(text, data, str(path)))

    return _in_threads(source, sorted(pictures, key=lambda path: path.relative_to(folder).as_posix()))


def _shard(path: Path) -> list[Source]:
    """The images of a WebDataset shard; members up to the first dot of their names are one sample."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in _members(path):
        place = PurePosixPath(member.name)
        stem, _, suffix = place.name.partition(".")
        if stem and member.isreg():
            samples.setdefault(str(place.parent / stem), {})["." + suffix.lower()] = member
    found = []
    with open(path, "rb") as file:

        def read(member: tarfile.TarInfo | None) -> bytes | None:
            if member is None:
                return None
            file.seek(member.offset_data)
            return file.read(member.size)

        for key in sorted(samples):
            sample = samples[key]
            for suffix in sorted(SUFFIXES & sample.keys()):
                image = sample[suffix]
                name = f"{path}/{image.name}"
                captions = captions_of(read(sample.get(".txt")), read(sample.get(".json")), name)
                found.append(Source(name, str(path), image.offset_data, image.size, captions))
    if not found:
        raise DAVAEError(f"the shard {path} holds no images ({', '.join(sorted(SUFFIXES))})")
    return found


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


def _in_threads(do: Callable[[T], U], things: Sequence[T]) -> list[U]:
    """``do`` of each thing, in order; the time goes to waiting for the disk."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(do, things))
