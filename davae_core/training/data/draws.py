"""Random numbers that depend on (seed, step, position in the batch) alone, and so survive resume and many processes."""

import torch

from .batches import sample_seed


class Draws:
    """The random numbers of one step, one stream per sample.

    Every quantity has a ``name`` of its own, so that adding one does not move the others.
    """

    def __init__(self, seed: int, step: int, positions: torch.Tensor) -> None:
        self.seed, self.step, self.positions = seed, step, positions.tolist()

    def _generators(self, name: str) -> list[torch.Generator]:
        key = int.from_bytes(name.encode()[:7].ljust(7, b"\0"), "big")
        return [
            torch.Generator().manual_seed(sample_seed(self.seed, key, self.step, position))
            for position in self.positions
        ]

    def normal(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers in the shape and on the device of ``like [B, ...]``, float32."""
        parts = [torch.randn(like.shape[1:], generator=generator) for generator in self._generators(name)]
        return torch.stack(parts).to(like.device)

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """``[B, *shape]`` numbers in [0, 1), on the CPU."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._generators(name)])

    def gaussian(self, name: str) -> torch.Tensor:
        """``[B]`` standard normal numbers, on the CPU."""
        return torch.stack([torch.randn((), generator=generator) for generator in self._generators(name)])
