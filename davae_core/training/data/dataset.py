"""Images for training: what a step sees depends on the seed and the step alone."""

import logging
import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ...errors import DAVAEError
from .batches import BatchPlan, Draw, sample_seed
from .sources import UNREADABLE, Source, index, sizes

RATIO = 2.0
CROP_X, CROP_Y, FLIP, CAPTION = 1, 2, 3, 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are cut."""

    images: tuple[str, ...]
    """Folders of images (png, jpg, jpeg, webp, bmp; searched recursively) and WebDataset shards (.tar, with * and
    {000..012}). The caption of an image is in a .txt or .json (key "caption", text or list) of the same name."""
    size: int = 1024
    """Side of the square that images are cut to; with buckets the square root of their area."""
    buckets: bool = False
    """Cut to about the image's own aspect ratio, from 1:2 to 2:1, instead of a square."""
    random_crop: bool = False
    """Crop at a random place instead of the centre."""
    flip: bool = True
    """Mirror half of the images, chosen anew every time."""
    workers: int = 2
    """Processes that load images; 0 loads in the training process."""
    cache: bool = False
    """Keep all images in memory after the first reading, as they are before cropping, and load in the training process.
    For small sets."""
    max_broken: int = 10
    """Unreadable images that are named and replaced by their neighbours; at one more, training stops."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.workers < 0 or self.max_broken < 0:
            raise DAVAEError(f"size must be at least 1, workers and max_broken not negative, got {self}")


class Item(TypedDict):
    """One image as the training sees it."""

    image: torch.Tensor
    """``[3, h, w]`` float32 in [-1, 1]."""
    caption: str
    name: str
    position: int
    """In the global batch."""
    broken: list[str]
    """Images that could not be read and that this one replaces."""


def shapes(size: int, multiple: int, buckets: bool) -> list[tuple[int, int]]:
    """The (width, height) that images are cut to.

    Args:
        size: side of the square, or with buckets the root of the largest area.
        multiple: all sides are multiples of it.
        buckets: shapes from 1:2 to 2:1, among them a square; else the square alone.

    Raises:
        DAVAEError: the size is no multiple, or with buckets below the smallest.
    """
    if not buckets:
        if size % multiple:
            below = size // multiple * multiple
            near = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise DAVAEError(f"the size {size} is not a multiple of {multiple}; use {near} (--data.size)")
        return [(size, size)]
    side = size // multiple * multiple
    if not side:
        raise DAVAEError(f"the size {size} is below {multiple}, the smallest side there is (--data.size)")
    found = {(side, side)}
    for short in range(multiple, side + 1, multiple):
        long = size**2 // short // multiple * multiple
        if long <= RATIO * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_shape(size: tuple[int, int], among: Sequence[tuple[int, int]]) -> int:
    """Index of the shape whose aspect ratio is nearest to that of ``size``, both (width, height)."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(among)), key=lambda i: (abs(math.log(among[i][0] / among[i][1]) - ratio), i))


def cover(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """``image`` scaled, keeping its ratio, to the smallest size that covers ``shape`` (width, height)."""
    scale = max(shape[0] / image.width, shape[1] / image.height)
    size = max(shape[0], round(image.width * scale)), max(shape[1], round(image.height * scale))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


class ImageData(Dataset[Item]):
    """Images by their draw.

    Args:
        sources: the images.
        shapes: (width, height) of every bucket.
        bucket_of: bucket of each image.
        config: how to crop, flip and keep.
    """

    def __init__(
        self, sources: Sequence[Source], shapes: Sequence[tuple[int, int]], bucket_of: Sequence[int], config: DataConfig
    ) -> None:
        self.sources, self.shapes, self.bucket_of, self.config = sources, shapes, bucket_of, config
        self.kept: dict[int, np.ndarray] = {}

    def __getitem__(self, draw: Draw) -> Item:
        """The image of a draw, or of the next readable image of its bucket.

        After more than ``max_broken`` unreadable ones in a row the image is black: :func:`loader` stops there.
        """
        width, height = self.shapes[self.bucket_of[draw.index]]
        pixels, i, broken = np.zeros((height, width, 3), np.uint8), draw.index, []
        for i in self._candidates(draw.index):
            try:
                pixels = self._covering(i)
                break
            except UNREADABLE:
                broken.append(self.sources[i].name)
        x, y = (pixels.shape[1] - width) // 2, (pixels.shape[0] - height) // 2
        if self.config.random_crop:
            x = sample_seed(draw.seed, CROP_X) % (pixels.shape[1] - width + 1)
            y = sample_seed(draw.seed, CROP_Y) % (pixels.shape[0] - height + 1)
        pixels = pixels[y : y + height, x : x + width]
        if self.config.flip and sample_seed(draw.seed, FLIP) % 2:
            pixels = pixels[:, ::-1]
        source = self.sources[i]
        captions = source.captions or ("",)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 127.5 - 1,
            "caption": captions[sample_seed(draw.seed, CAPTION) % len(captions)],
            "name": source.name,
            "position": draw.position,
            "broken": broken,
        }

    def _candidates(self, first: int) -> Iterator[int]:
        """``first`` and the images after it in its bucket, around the end, as many as may be tried."""
        bucket, count, tries = self.bucket_of[first], len(self.sources), 0
        for i in chain(range(first, count), range(first)):
            if self.bucket_of[i] == bucket:
                yield i
                tries += 1
                if tries > self.config.max_broken:
                    return

    def _covering(self, i: int) -> np.ndarray:
        """Image ``i`` ``[H, W, 3]`` uint8, scaled to cover the shape of its bucket."""
        if i in self.kept:
            return self.kept[i]
        pixels = np.asarray(cover(self.sources[i].open(), self.shapes[self.bucket_of[i]]))
        if self.config.cache:
            self.kept[i] = pixels
        return pixels


def loader(
    config: DataConfig,
    batch: int,
    seed: int,
    multiple: int,
    *,
    start: int = 0,
    steps: int,
    rank: int = 0,
    world: int = 1,
    micro_batch: int | None = None,
) -> Iterable[dict[str, Any]]:
    """This process's images for the steps ``start`` to ``steps - 1``.

    Args:
        config: the images.
        batch: images per step, over all processes.
        seed: of the order, the crops, the flips and the choice of captions.
        multiple: sides are multiples of it.
        start, steps: the first step, and the one after the last.
        rank, world: this process and how many there are; it takes the positions from ``rank * batch / world`` on.
        micro_batch: images at once; the share of a process is cut into such parts. None: the whole share.

    Returns:
        An iterable of dicts, one per micro-batch: ``image`` ``[b, 3, h, w]`` float32 in [-1, 1]; ``caption`` and
        ``name``, lists of b; ``position`` ``[b]`` int64, places in the global batch; ``step``; ``micro``, from 0, of
        ``micros`` in the step; ``broken``, names of unreadable images met for the first time, which are
        also logged.

    Raises:
        DAVAEError: the batch cannot be divided so; no images; a size that is not possible; and, while iterating, more
            than ``max_broken`` unreadable images.
    """
    share = batch // max(1, world)
    part = micro_batch or share
    if batch < 1 or not 0 <= rank < world or part < 1 or batch % (world * part):
        raise DAVAEError(
            f"a batch of {batch} cannot be divided among {world} processes (this is {rank}) in parts of {part} images: "
            "the batch must be a multiple of processes times micro-batch (--run.batch, --run.micro-batch)"
        )
    cuts = shapes(config.size, multiple, config.buckets)
    sources = index(config.images)
    bucket_of = [0] * len(sources)
    if config.buckets:
        bucket_of = [nearest_shape(size or (1, 1), cuts) for size in sizes(sources)]
    plan = BatchPlan(bucket_of, batch, seed)
    few = [indices for indices in plan.members.values() if len(indices) < batch]
    if config.buckets and few:
        logger.warning(
            "%d of %d aspect-ratio buckets hold fewer images than a batch of %d: %d images are repeated within batches",
            *(len(few), len(plan.members), batch, sum(map(len, few))),
        )
    data = ImageData(sources, cuts, bucket_of, config)

    def parts() -> Iterator[list[Draw]]:
        for step in range(start, steps):
            draws = plan.batch(step)[rank * share : (rank + 1) * share]
            yield from (draws[i : i + part] for i in range(0, share, part))

    return _batches(data, _Parts(parts()), start, share // part)


class _Parts:
    """The draws of each micro-batch, for a DataLoader."""

    def __init__(self, parts: Iterator[list[Draw]]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.parts


def _batches(data: ImageData, parts: _Parts, start: int, micros: int) -> Iterator[dict[str, Any]]:
    """Micro-batches in order; counts the unreadable images."""
    workers = 0 if data.config.cache else data.config.workers
    loading: DataLoader = DataLoader(
        data,
        batch_sampler=parts,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    seen: set[str] = set()
    for count, batch in enumerate(loading):
        batch["broken"] = [name for name in dict.fromkeys(batch["broken"]) if name not in seen]
        seen.update(batch["broken"])
        for name in batch["broken"]:
            logger.warning("could not read %s: another image takes its place", name)
        if len(seen) > data.config.max_broken or len(seen) == len(data.sources):
            raise DAVAEError(
                f"{len(seen)} of {len(data.sources)} images could not be read: {', '.join(sorted(seen))}. Repair or "
                "remove them, or allow more (--data.max-broken)"
            )
        yield batch | {"step": start + count // micros, "micro": count % micros, "micros": micros}


def _collate(items: list[Item]) -> dict[str, Any]:
    """Items to a micro-batch."""
    return {
        "image": torch.stack([item["image"] for item in items]),
        "caption": [item["caption"] for item in items],
        "name": [item["name"] for item in items],
        "position": torch.tensor([item["position"] for item in items]),
        "broken": [name for item in items for name in item["broken"]],
    }


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; a loading one goes on, so that the training can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
