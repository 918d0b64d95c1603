"""Pictures to measure with: the ones a model was trained on, with their captions, and held-out ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import caption_files, images
from ..errors import DAVAEError
from .references import References


@dataclass(frozen=True)
class Picture:
    """An image file and its caption, "" where it has none."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Pictures:
    """What there is to measure on.

    Attributes:
        training: pictures that the model was trained on; those of a folder that nobody divided.
        held_out: pictures that it never saw.
    """

    training: list[Picture]
    held_out: list[Picture]


def find_pictures(folder: Path, held_out: Path | None = None) -> Pictures:
    """Look into folders and below; the caption of ``a.png`` is in ``a.txt``, ``a.caption`` or ``a.json``.

    Args:
        folder: holds training pictures; one that has ``train/`` and ``held_out/`` in it, as
            ``davae_core.training.tiny.data`` writes it, holds both kinds.
        held_out: holds the held-out ones.

    Raises:
        DAVAEError: one is no folder or holds no images, or a caption cannot be read.
    """
    train = folder / "train" if (folder / "train").is_dir() else folder
    if held_out is None and (folder / "held_out").is_dir():
        held_out = folder / "held_out"
        if train == folder:
            return Pictures([], _read(held_out))
    return Pictures(_read(train), _read(held_out) if held_out is not None else [])


def _read(folder: Path) -> list[Picture]:
    return [Picture(path, caption_of(path)) for path in images.find_images(folder)]


def caption_of(path: Path) -> str:
    """The caption beside an image, "" where there is none.

    Raises:
        DAVAEError: its file cannot be read.
    """
    beside = {ending: path.with_suffix(ending) for ending in caption_files.ENDINGS}
    try:
        content = {ending: file.read_bytes() for ending, file in beside.items() if file.is_file()}
        texts = caption_files.read(content, str(path)).texts
    except (OSError, DAVAEError) as problem:
        raise DAVAEError(f"the caption of {path} cannot be read ({problem}); write it again, as UTF-8") from problem
    return texts[0] if texts else ""


def spread(pictures: Sequence[Picture], count: int) -> list[int]:
    """At most so many places of captioned pictures, evenly spread, no caption twice.

    Raises:
        DAVAEError: none has a caption.
    """
    seen: dict[str, int] = {}
    for i, picture in enumerate(pictures):
        if picture.caption:
            seen.setdefault(picture.caption, i)
    places = list(seen.values())
    if not places:
        raise DAVAEError("no picture has a caption to draw; write it into a .txt of the same name beside each")
    return [places[i * len(places) // count] for i in range(count)] if count < len(places) else places


def read_square(path: Path, side: int) -> torch.Tensor:
    """An image ``[3, side, side]`` in [-1, 1]: its largest centred square, resized where it has another size.

    Raises:
        DAVAEError: it cannot be read.
    """
    x = images.read_image(path)
    if x.shape[1:] == (side, side):
        return x
    short = min(x.shape[1:])
    top, left = (x.shape[1] - short) // 2, (x.shape[2] - short) // 2
    square = x[None, :, top : top + short, left : left + short]
    return F.interpolate(square, size=(side, side), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def read_squares(pictures: Sequence[Picture], side: int) -> torch.Tensor:
    """``[N, 3, side, side]``, see :func:`read_square`."""
    return torch.stack([read_square(picture.path, side) for picture in pictures])


def read_batches(pictures: Sequence[Picture], size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images ``[B, 3, H, W]`` as they are, at most ``size`` at a time; neighbours of one size go together."""
    waiting: list[torch.Tensor] = []
    for picture in pictures:
        image = images.read_image(picture.path)
        if waiting and (len(waiting) == size or waiting[0].shape != image.shape):
            yield torch.stack(waiting).to(device)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting).to(device)


def references_of(pictures: Pictures, side: int = 32, most: int = 4096) -> References:
    """Small versions of the captioned pictures, to look up which one a drawing is nearest to.

    Args:
        pictures: where several have one caption the first counts.
        side: of the references, in pixels.
        most: of each kind; more are thinned out evenly.

    Raises:
        DAVAEError: none has a caption, or one cannot be read.
    """
    some: dict[str, tuple[Picture, bool]] = {}
    for kind, held_out in ((pictures.training, False), (pictures.held_out, True)):
        for place in spread(kind, most) if any(picture.caption for picture in kind) else ():
            some.setdefault(kind[place].caption, (kind[place], held_out))
    if not some:
        raise DAVAEError("no picture has a caption; write it into a .txt of the same name beside each")
    small = torch.stack([F.adaptive_avg_pool2d(_square(picture.path), side) for picture, _ in some.values()])
    return References(small, tuple(some), torch.tensor([out for _, out in some.values()]))


def _square(path: Path) -> torch.Tensor:
    x = images.read_image(path)
    return read_square(path, min(x.shape[1:])) if x.shape[1] != x.shape[2] else x
