"""Half and twice the resolution, as the layers of the LDM autoencoders do it."""

import torch
import torch.nn.functional as F
from torch import nn


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution; pads one pixel on the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by nearest neighbour, then a convolution.

    Without gradients this is, for each of the four positions in a pixel, a 2x2 convolution of the small picture, whose
    weights are sums of the 3x3 ones: the same to rounding in four ninths of the work, and nothing enlarged is held.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.enlarge(F.pad(x, (1, 1, 1, 1)), self.position_weights())

    def position_weights(self) -> list[list[torch.Tensor]]:
        """The 2x2 kernels by the row and the column, 0 or 1, of the position in a pixel."""
        weight = self.conv.weight.float()
        return [[_taps(_taps(weight, 2, v), 3, u).to(self.conv.weight) for u in (0, 1)] for v in (0, 1)]

    def enlarge(self, small: torch.Tensor, weights: list[list[torch.Tensor]]) -> torch.Tensor:
        """``[B, c, h + 2, w + 2]``, which has its neighbours on every side, to ``[B, c, 2 h, 2 w]``."""
        batch, _, rows, columns = (side - 2 if i > 1 else side for i, side in enumerate(small.shape))
        large = small.new_empty(batch, self.conv.out_channels, 2 * rows, 2 * columns)
        for v in (0, 1):
            for u in (0, 1):
                part = small[:, :, v : v + rows + 1, u : u + columns + 1]
                large[:, :, v::2, u::2] = F.conv2d(part, weights[v][u], self.conv.bias)
        return large


def _taps(weight: torch.Tensor, dim: int, position: int) -> torch.Tensor:
    """Three taps in the large picture as two in the small one, for the first or the second pixel of each pair."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a + b, c] if position else [a, b + c], dim)
