"""Exponential moving average of trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class EMA:
    """Keeps ``average = decay * average + (1 - decay) * weight``, with a smaller decay in the first steps.

    Args:
        weights: the trained parameters by name; they are read at every update.
        decay: in [0, 1); 0 keeps no average: it is the weights themselves.
    """

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self.weights, self.decay = dict(weights), decay
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()} if decay else {}
        self.swapped = False
        """The weights are the average now, or on the way to or from it."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step`` (from 1)."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            current = [weight.detach() for weight in self.weights.values()]
            torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are the average inside the ``with`` block."""
        if not self.decay:
            yield
            return
        kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.swapped = True
        try:
            self._put(self.average)
            yield
        finally:
            self._put(kept)
            self.swapped = False

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])
