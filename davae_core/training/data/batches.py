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

    An epoch goes through every bucket in a random order of its own; the last batch of a bucket is filled up with the
    bucket's first images in that order. The batches of all buckets are then mixed.

    Args:
        bucket_of: bucket of each image; the images of a batch come from one bucket.
        batch: images per step, over all processes.
        seed: of all orders and of the seeds of the draws.

    Raises:
        DAVAEError: no images, or a batch below 1.
    """

    def __init__(self, bucket_of: Sequence[int], batch: int, seed: int) -> None:
        if not len(bucket_of) or batch < 1:
            raise DAVAEError(f"batches need at least one image and one place, got {len(bucket_of)} images, {batch=}")
        self.batch_size, self.seed = batch, seed
        members: dict[int, list[int]] = {}
        for index, bucket in enumerate(bucket_of):
            members.setdefault(bucket, []).append(index)
        self.members = {bucket: torch.tensor(members[bucket]) for bucket in sorted(members)}
        self.steps_per_epoch = sum(-(-len(indices) // batch) for indices in self.members.values())
        self._known: tuple[int, torch.Tensor] | None = None

    def batch(self, step: int) -> list[Draw]:
        """The draws of a step, by position."""
        epoch, place = divmod(step, self.steps_per_epoch)
        indices = self._epoch(epoch)[place].tolist()
        return [
            Draw(index, epoch, step, position, sample_seed(self.seed, DRAW, step, position))
            for position, index in enumerate(indices)
        ]

    def _epoch(self, epoch: int) -> torch.Tensor:
        """Image indices ``[steps_per_epoch, batch]``; that of the last epoch asked for is kept."""
        if self._known is None or self._known[0] != epoch:
            rows = []
            for bucket, indices in self.members.items():
                order = indices[_permutation(len(indices), self.seed, SHUFFLE_IMAGES, epoch, bucket)]
                places = torch.arange(-(-len(order) // self.batch_size) * self.batch_size) % len(order)
                rows.append(order[places].view(-1, self.batch_size))
            plan = torch.cat(rows)
            self._known = epoch, plan[_permutation(len(plan), self.seed, SHUFFLE_BATCHES, epoch)]
        return self._known[1]


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
