"""Which images make up the batch of a step: a pure function of the seed and the step.

Nothing here remembers where a training is, so a resumed run and every process of many see the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import DAVAEError

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
# First numbers after the seed, so that no two uses of it share a stream.
SHUFFLE_IMAGES, SHUFFLE_BATCHES, DRAW = 1, 2, 3


@dataclass(frozen=True)
class Draw:
    """One image of one batch."""

    index: int
    """Of the image in the collection."""
    epoch: int
    """Passes over the collection before this one."""
    step: int
    """Optimiser step, from 0."""
    position: int
    """Place in the global batch of the step."""
    seed: int
    """For everything random about this image in this step."""


class BatchPlan:
    """The global batch of every step.

    An epoch goes through every bucket in a random order of its own: through each image as often as it has repeats, in
    a batch at most once. So a bucket of fewer images than a batch gives short batches; another's last one is filled
    up with the bucket's first images in that order. The batches of all buckets are then mixed.

    Args:
        bucket_of: bucket of each image; the images of a batch come from one bucket.
        batch: images per step, over all processes.
        seed: of all orders and of the seeds of the draws.
        repeats: how often an epoch goes through each image; None: once through all.

    Raises:
        DAVAEError: no images, or a batch below 1.
    """

    def __init__(self, bucket_of: Sequence[int], batch: int, seed: int, repeats: Sequence[int] | None = None) -> None:
        if not len(bucket_of) or batch < 1:
            raise DAVAEError(f"batches need at least one image and one place, got {len(bucket_of)} images, {batch=}")
        self.batch_size, self.seed = batch, seed
        members: dict[int, list[int]] = {}
        for index, bucket in enumerate(bucket_of):
            members.setdefault(bucket, []).append(index)
        self.members = {bucket: torch.tensor(members[bucket]) for bucket in sorted(members)}
        self.repeats = torch.tensor(repeats) if repeats is not None else torch.ones(len(bucket_of), dtype=torch.long)
        self._batches = {bucket: self._count(indices) for bucket, indices in self.members.items()}
        self.steps_per_epoch = sum(self._batches.values())
        self._known: tuple[int, list[torch.Tensor]] | None = None

    def batch(self, step: int) -> list[Draw]:
        """The draws of a step, by position: at most ``batch_size``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        indices = self._epoch(epoch)[place].tolist()
        return [
            Draw(index, epoch, step, position, sample_seed(self.seed, DRAW, step, position))
            for position, index in enumerate(indices)
        ]

    def _count(self, indices: torch.Tensor) -> int:
        """Batches of a bucket in an epoch: enough for all, and for an image to be in as many as it has repeats."""
        repeats = self.repeats[indices]
        return max(-(-int(repeats.sum()) // self.batch_size), int(repeats.max()))

    def _epoch(self, epoch: int) -> list[torch.Tensor]:
        """Image indices of each batch of an epoch; those of the last epoch asked for are kept."""
        if self._known is None or self._known[0] != epoch:
            rows = []
            for bucket, indices in self.members.items():
                order = indices[_permutation(len(indices), self.seed, SHUFFLE_IMAGES, epoch, bucket)]
                rows += self._dealt(order, self._batches[bucket])
            plan = _permutation(len(rows), self.seed, SHUFFLE_BATCHES, epoch).tolist()
            self._known = epoch, [rows[i] for i in plan]
        return self._known[1]

    def _dealt(self, order: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Images in this order in ``count`` batches, one after another; with repeats dealt like cards: copies of one
        image, at most ``count``, lie side by side and so come into different batches."""
        times, whole = self.repeats[order], len(order) >= self.batch_size
        if int(times.max()) == 1:
            filled = order.repeat(2)[: count * self.batch_size] if whole else order
            return list(filled.split(self.batch_size))
        missing = count * self.batch_size - int(times.sum())
        if whole and missing < self.batch_size:
            times[(times < count).nonzero()[:missing, 0]] += 1
        copies = order.repeat_interleave(times)
        return [copies[first::count] for first in range(count)]


@dataclass(frozen=True)
class Part:
    """A micro-batch of one process.

    Attributes:
        draws: its images, at least one.
        micro, micros: its number, from 0, and how many every process has in this step.
        share: what the mean of its losses counts in the sum over the process's micro-batches, so that the mean of the
            sums over processes is the mean over the batch. 0 where there was no image left for it; it then has one of
            another part, because every process must take part in every step.
    """

    draws: list[Draw]
    micro: int
    micros: int
    share: float


def parts(batch: Sequence[Draw], rank: int, world: int, size: int | None) -> list[Part]:
    """A process's part of a batch, in micro-batches.

    Args:
        batch: of all processes; divided as evenly as it can be, in its order.
        rank, world: this process and how many there are.
        size: images in a micro-batch at most; None: all of a process.
    """
    most = -(-len(batch) // world)
    micros = -(-most // (size or most))
    mine = _cut(batch, world)[rank]
    made = []
    for micro, draws in enumerate(_cut(mine, micros)):
        share = world * len(draws) / len(batch)
        made.append(Part(list(draws) or [batch[-1]], micro, micros, share))
    return made


def _cut(things: Sequence[Draw], count: int) -> list[Sequence[Draw]]:
    """``count`` pieces, one after another, the longer ones first; none differ by more than one in length."""
    each, more = divmod(len(things), count)
    ends = [each * i + min(i, more) for i in range(count + 1)]
    return [things[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def sample_seed(seed: int, *numbers: int) -> int:
    """A number in [0, 2^63) that depends on all arguments and their order; the same on every machine.

    Every argument is taken modulo 2^64 and goes through the finaliser of splitmix64, in a chain: neighbouring
    arguments give unrelated results.
    """
    state = _mix(seed + GOLDEN)
    for number in numbers:
        state = _mix((state + GOLDEN) ^ _mix(number + GOLDEN))
    return state >> 1


def _mix(value: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit numbers in which every input bit moves every output bit."""
    value &= MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def _permutation(count: int, seed: int, *numbers: int) -> torch.Tensor:
    """A random order of ``count`` things."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(sample_seed(seed, *numbers)))
