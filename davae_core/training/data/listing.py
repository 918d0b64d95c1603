"""Images that were found, and what was not taken and why."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import BinaryIO, TypeVar

from PIL import Image
from tqdm import tqdm

from ...errors import DAVAEError
from . import pictures
from .pictures import UNREADABLE
from .windows import Window

THREADS = 16
SAMPLE = 4096
# What a run leaves in its folder.
STATE = "state.safetensors"

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
    """Captions to choose from, with the entry's prefix and suffix; may be empty."""
    captioned: bool = False
    """Whether there is a caption of its own."""
    repeats: int = 1
    """How often an epoch goes through it."""
    side: int = 0
    """What its entry says of the size that it is cut to; 0: nothing."""
    size: tuple[int, int] = (0, 0)
    """Width and height as shown; (0, 0) before :func:`examined`."""
    identity: str = ""
    """Tells the encoded image apart from others, wherever it lies; "" before :func:`examined`."""

    @property
    def caption(self) -> str:
        """The first caption, or an empty one."""
        return self.captions[0] if self.captions else ""

    def bytes(self) -> BinaryIO:
        """The encoded image, as a file.

        Raises:
            OSError: the file cannot be read.
        """
        return Window(self.file, self.offset, self.length)  # type: ignore[return-value]

    def open(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The image upright, in RGB, over white where it is transparent.

        Args:
            at_least: (width, height) that are needed, see :func:`davae_core.training.data.pictures.opened`.

        Raises:
            one of UNREADABLE.
        """
        with self.bytes() as file:
            return pictures.opened(file, at_least)

    def reason(self, problem: BaseException) -> str:
        """Why :meth:`open` raised."""
        try:
            with self.bytes() as file:
                start = file.read(64)
        except OSError:
            start = b"?"
        return pictures.reason(problem, start)


@dataclass
class Listing:
    """What the entries of --data.images hold.

    Attributes:
        sources: the images, entries in the given order, each sorted by path.
        left_out: names of what is not taken, by why.
        noted: names of what is taken, by what is odd about it.
        unreadable: reasons by name.
    """

    sources: list[Source] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, list[str]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def leave_out(self, why: str, name: str) -> None:
        """Say why something is not taken."""
        self.left_out.setdefault(why, []).append(name)

    def add(self, other: "Listing") -> None:
        """Take over what another listing says, but for its sources; each name once."""
        for mine, theirs in ((self.left_out, other.left_out), (self.noted, other.noted)):
            for what, names in theirs.items():
                mine[what] = list(dict.fromkeys([*mine.get(what, []), *names]))
        self.unreadable |= other.unreadable

    def note(self, what: str, name: str) -> None:
        """Say what is odd about an image that is taken."""
        self.noted.setdefault(what, []).append(name)


def examined(source: Source) -> Source | str:
    """The source with its size and identity, or the reason why it cannot be read. No pixel is decoded.

    The identity is a hash of the length and of the first, middle and last 4 KB of the encoded image (of a format
    without compression: of all of it). It is cheap, the same in a folder, a copy of it and a shard, and another for any
    picture that was saved anew: the end of a PNG holds a checksum of all pixels, and a JPEG's length changes with them.
    """
    try:
        if not stat.S_ISREG(os.stat(source.file).st_mode):
            return "it is no regular file"
        with source.bytes() as file:
            form, size = pictures.header(file)
            length = file.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(length).encode(), digest_size=16)
            whole = form in pictures.UNCOMPRESSED or length <= 3 * SAMPLE
            places = [0] if whole else [0, (length - SAMPLE) // 2, length - SAMPLE]
            for place in places:
                file.seek(place)
                digest.update(file.read(-1 if whole else SAMPLE))
    except UNREADABLE as problem:
        return source.reason(problem)
    return replace(source, size=size, identity=digest.hexdigest())


def in_threads(do: Callable[[T], U], things: Sequence[T], about: str = "") -> list[U]:
    """``do`` of each thing, in order; the time goes to waiting for the disk.

    Args:
        about: what is being done, for a bar that comes up after some seconds; "" for none.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        done: Iterable[U] = pool.map(do, things)
        return list(tqdm(done, about, len(things), delay=2, leave=False, disable=not about))
