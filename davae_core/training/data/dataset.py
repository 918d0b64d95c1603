"""Images, or their latents, for training: what a step sees depends on the seed and the step alone."""

import logging
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from typing_extensions import NotRequired

from ...errors import DAVAEError
from ...images import from_bytes
from . import cutting, survey
from .batches import BatchPlan, Draw, Part, parts, sample_seed
from .config import DataConfig
from .latents import Latents, latent_key
from .listing import Source
from .pictures import UNREADABLE
from .survey import Collection

CROP_X, CROP_Y, FLIP, CAPTION = 1, 2, 3, 4

STOPS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


class Item(TypedDict):
    """One image as the training sees it."""

    image: NotRequired[torch.Tensor]
    """``[3, h, w]`` float32 in [-1, 1]; not there where latents are given."""
    latent: NotRequired[torch.Tensor]
    """``[c, h', w']`` float32 in the model's units, where latents are given."""
    caption: str
    name: str
    position: int
    """In the global batch."""
    broken: dict[str, str]
    """Images that could not be read and that this one replaces, with the reasons."""


class ImageData(Dataset[Item]):
    """Images by their draw.

    Args:
        sources: the images.
        shapes: (width, height) of every bucket.
        bucket_of: bucket of each image.
        config: how to crop, flip and keep.
        latents: of the images; then no image is read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        shapes: Sequence[tuple[int, int]],
        bucket_of: Sequence[int],
        config: DataConfig,
        latents: Latents | None = None,
    ) -> None:
        self.sources, self.shapes, self.bucket_of, self.config = sources, shapes, bucket_of, config
        self.latents = latents
        self.kept: dict[int, np.ndarray] = {}

    def __getitem__(self, draw: Draw) -> Item:
        """The image of a draw, or of the next readable image of its bucket.

        After more than ``max_broken`` unreadable ones in a row the image is black: :func:`loader` stops there.
        """
        i, broken, shape = draw.index, {}, self.shapes[self.bucket_of[draw.index]]
        mirrored = self.config.flip and bool(sample_seed(draw.seed, FLIP) % 2)
        if self.latents is not None:
            found = {"latent": self.latents(latent_key(self.sources[i], shape, mirrored))}
        else:
            picture = Image.new("RGB", shape)
            for i in self._candidates(draw.index):
                try:
                    picture = self._fitted(i)
                    break
                except UNREADABLE as problem:
                    broken[self.sources[i].name] = self.sources[i].reason(problem)
            pixels = np.asarray(cutting.crop(picture, shape, *self._place(picture.size, shape, draw)))
            found = {"image": from_bytes(np.array(pixels[:, ::-1] if mirrored else pixels)).contiguous()}
        source = self.sources[i]
        captions = source.captions or ("",)
        return {
            **found,  # type: ignore[typeddict-item]
            "caption": captions[sample_seed(draw.seed, CAPTION) % len(captions)],
            "name": source.name,
            "position": draw.position,
            "broken": broken,
        }

    def _place(self, size: tuple[int, int], shape: tuple[int, int], draw: Draw) -> tuple[int, int]:
        """Left and top of the crop in the image scaled to cover the shape."""
        free = [a - b for a, b in zip(cutting.covering(size, shape), shape, strict=True)]
        if self.config.random_crop:
            return sample_seed(draw.seed, CROP_X) % (free[0] + 1), sample_seed(draw.seed, CROP_Y) % (free[1] + 1)
        return free[0] // 2, free[1] // 2

    def _candidates(self, first: int) -> Iterator[int]:
        """``first`` and the images after it in its bucket, around the end, as many as may be tried."""
        bucket, count, tries = self.bucket_of[first], len(self.sources), 0
        for i in chain(range(first, count), range(first)):
            if self.bucket_of[i] == bucket:
                yield i
                tries += 1
                if tries > self.config.max_broken:
                    return

    def _fitted(self, i: int) -> Image.Image:
        """Image ``i``, shrunk to cover the shape of its bucket where it is larger."""
        if i in self.kept:
            return Image.fromarray(self.kept[i])
        shape = self.shapes[self.bucket_of[i]]
        # Turned or not, this covers the shape at any ratio.
        picture = cutting.shrunk(self.sources[i].open(at_least=cutting.covering(self.sources[i].size, shape)), shape)
        if self.config.cache:
            self.kept[i] = np.asarray(picture)
        return picture


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
    collection: Collection | None = None,
    latents: Latents | None = None,
) -> Iterable[dict[str, Any]]:
    """This process's images for the steps ``start`` to ``steps - 1``.

    Args:
        config: the images.
        batch: images per step, over all processes; a bucket of fewer images gives fewer.
        seed: of the order, the crops, the flips and the choice of captions.
        multiple: sides are multiples of it.
        start, steps: the first step, and the one after the last.
        rank, world: this process and how many there are. They divide a batch as evenly as it can be, by position.
        micro_batch: images at once; the share of a process is cut into such parts, the same number of them in every
            process. None: the whole share.
        collection: what was found of ``config``; None looks for it.
        latents: of the images, by key; no image is then read.

    Returns:
        An iterable of dicts, one per micro-batch: ``image`` ``[b, 3, h, w]`` float32 in [-1, 1], or with ``latents``
        ``latent`` ``[b, c, h', w']``; ``caption`` and ``name``, lists of b; ``position`` ``[b]`` int64, places in the
        global batch; ``step``; ``micro``, from 0, of ``micros`` in the step; ``share``, see
        :class:`davae_core.training.data.batches.Part`: the gradient is that of the sum of loss times share;
        ``broken``, reasons by name of unreadable images met for the first time, which are also logged.

    Raises:
        DAVAEError: no images; a size that is not possible; and, while iterating, more than ``max_broken`` unreadable
            images.
    """
    if batch < 1 or not 0 <= rank < world or (micro_batch is not None and micro_batch < 1):
        raise DAVAEError(
            f"a batch of {batch} cannot be divided among {world} processes (this is {rank}) in parts of {micro_batch} "
            "images (--run.batch, --run.micro-batch)"
        )
    found = collection or survey.collect(config, multiple)
    plan = BatchPlan(found.bucket_of, batch, seed, [source.repeats for source in found.sources])
    data = ImageData(found.sources, found.shapes, found.bucket_of, config, latents)

    def planned() -> Iterator[tuple[int, Part]]:
        for step in range(start, steps):
            yield from ((step, part) for part in parts(plan.batch(step), rank, world, micro_batch))

    return _batches(data, planned(), len(found.table.left_out.get(survey.UNREADABLE, ())))


def held_out(
    config: DataConfig,
    multiple: int,
    batch: int,
    *,
    rank: int = 0,
    world: int = 1,
    limit: int | None = None,
    collection: Collection | None = None,
    latents: Latents | None = None,
) -> Iterator[dict[str, Any]]:
    """The images that training never sees (``--data.held-out``), in an order that is always the same.

    Cropped at the centre, not mirrored, each with its first caption; the images of a batch have one shape.

    Args:
        config, multiple, collection, latents: as for :func:`loader`.
        batch: images at once, at most.
        rank, world: this process takes every ``world``-th batch, from ``rank`` on.
        limit: images at most, over all processes; None: all. A share's order is by content, so the first ones are a
            fair sample.

    Returns:
        Dicts as those of :func:`loader`; ``position`` is the place among all images held out, ``step`` 0. Nothing where
        none are held out. An image that cannot be read is logged and left out.
    """
    found = collection or survey.collect(config, multiple)
    straight = next(seed for seed in range(64) if not sample_seed(seed, FLIP) % 2)
    data = ImageData(found.held, found.shapes, found.held_bucket_of, fixed(config), latents)
    by_shape: dict[int, list[Draw]] = {}
    for i, bucket in enumerate(found.held_bucket_of[:limit]):
        by_shape.setdefault(bucket, []).append(Draw(i, 0, 0, i, straight))
    cut = [draws[i : i + batch] for _, draws in sorted(by_shape.items()) for i in range(0, len(draws), batch)]
    for draws in cut[rank::world]:
        items = [data[draw] for draw in draws]
        for item in items:
            for name, why in item["broken"].items():
                logger.warning("could not read %s: %s", name, why)
        if whole := [item for item in items if not item["broken"]]:
            yield _collate(whole) | {"step": 0, "micro": 0, "micros": 1, "share": 1.0}


def fixed(config: DataConfig) -> DataConfig:
    """The same images, each as it is: cut at the centre, none in the place of another."""
    return replace(config, random_crop=False, cache=False, max_broken=0)


class _Planned:
    """The draws of each micro-batch, for a DataLoader; remembers the parts whose images are on their way."""

    def __init__(self, planned: Iterator[tuple[int, Part]]) -> None:
        self.planned = planned
        self.under_way: deque[tuple[int, Part]] = deque()

    def __iter__(self) -> Iterator[list[Draw]]:
        for step, part in self.planned:
            self.under_way.append((step, part))
            yield part.draws


def _batches(data: ImageData, planned: Iterator[tuple[int, Part]], before: int) -> Iterator[dict[str, Any]]:
    """Micro-batches in order; counts the unreadable images, of which there were some before."""
    sampler = _Planned(planned)
    loading: DataLoader = DataLoader(
        data,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=0 if data.config.cache else data.config.workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    seen: dict[str, str] = {}
    with _signals_held():
        batches = iter(loading)  # starts the loading processes
    for batch in batches:
        step, part = sampler.under_way.popleft()
        batch["broken"] = {name: why for name, why in batch["broken"].items() if name not in seen}
        seen |= batch["broken"]
        for name, why in batch["broken"].items():
            logger.warning("could not read %s: %s; another image takes its place", name, why)
        if seen and (len(seen) + before > data.config.max_broken or len(seen) == len(data.sources)):
            raise DAVAEError(survey.too_many(seen, len(data.sources)))
        yield batch | {"step": step, "micro": part.micro, "micros": part.micros, "share": part.share}


def _collate(items: list[Item]) -> dict[str, Any]:
    """Items to a micro-batch."""
    kind = "latent" if "latent" in items[0] else "image"
    return {
        kind: torch.stack([item[kind] for item in items]),  # type: ignore[literal-required]
        "caption": [item["caption"] for item in items],
        "name": [item["name"] for item in items],
        "position": torch.tensor([item["position"] for item in items]),
        "broken": {name: why for item in items for name, why in item["broken"].items()},
    }


@contextmanager
def _signals_held() -> Iterator[None]:
    """Inside, signals to stop wait, and processes that are started do not get them before :func:`_leave_signals`: by a
    handler that PyTorch sets first, one would end them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; a loading one goes on, so that the training can finish its step."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
