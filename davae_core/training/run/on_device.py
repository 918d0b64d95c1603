"""The micro-batches of a step, of which the device holds one at a time."""

from collections.abc import Sequence
from typing import overload

import torch

from .task import Batch


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A copy of a batch whose tensors are on the device."""
    return {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}


class OnDevice(Sequence[Batch]):
    """Micro-batches in the computer's memory whose tensors are copied to the device each time one is asked for.

    Args:
        batches: as the loader gives them.
        device: where the copies are made.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return OnDevice(self.batches[index], self.device)
        return on_device(self.batches[index], self.device)
