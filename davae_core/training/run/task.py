"""What the loop trains: a set of phases, each a module whose forward is a loss."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ...history import History

Batch = dict[str, Any]
Losses = dict[str, torch.Tensor]


class Phase(nn.Module):
    """One player of a training, with its own optimiser. Its parameters that require gradients are trained."""

    def forward(self, batch: Batch, step: int) -> Losses:
        """Scalars to log by name; ``loss`` is what is minimised.

        Args:
            batch: of :func:`davae_core.training.data.dataset.loader`, tensors on the device.
            step: optimiser step, from 0.
        """
        raise NotImplementedError

    def shards(self) -> list[nn.Module]:
        """The modules that FSDP gathers one at a time, the one that holds the others last; none where a phase is not
        worth cutting. Only the forward passes of these modules may read their parameters."""
        return []

    def starts_at(self) -> int:
        """The first step at which this phase takes part."""
        return 0


class Task(Protocol):
    """A training: its phases in the order they take their steps, what it shows and what it leaves."""

    phases: dict[str, Phase]

    def to(self, device: torch.device) -> Any:
        """Move everything, also what is not trained."""

    def sheet(self, batch: Batch) -> torch.Tensor:
        """A picture ``[3, H, W]`` in [-1, 1] that shows how good the model is now.

        Args:
            batch: ``image``, ``caption`` and, where the run has prompts of its own, ``asked``: a list of
                :class:`~davae_core.training.text.asked.Asked` to draw instead of the captions.
        """

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures on held-out images, by name; the weights are the averaged ones, gradients are off."""

    def export(self, folder: Path, history: History) -> list[Path]:
        """Write the finished files; the weights are the averaged ones. Nothing that trains may change by it.

        Args:
            folder: where to.
            history: what the files tell of their training; the task adds what they belong to.
        """
