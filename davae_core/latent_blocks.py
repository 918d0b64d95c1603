"""The blocks between a trunk's features and the latent: s times smaller, and s times larger.

Source: the dc_down and dc_up blocks of the authors' SD3 release.
"""

import torch
import torch.nn.functional as F
from torch import nn


class DownBlock(nn.Module):
    """``[B, in, h, w] -> [B, out, h/s, w/s]``: convolution and pixel-unshuffle, plus a shortcut.

    The shortcut averages groups of the unshuffled channels; where they do not divide evenly it is a 1x1 convolution.
    The first half of the channels are means, the second log-variances, which start elsewhere. Where ``out / 2`` is no
    multiple of s^2, so that one channel of the convolution would become some of either, a convolution of stride s takes
    the place of the pixel-unshuffle.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int) -> None:
        super().__init__()
        self.scale, self.out_channels = scale, out_channels
        self.strided = out_channels % (2 * scale**2) != 0
        if self.strided:
            self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=scale, padding=1)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels // scale**2, 3, padding=1)
        unshuffled = in_channels * scale**2
        self.shortcut = _zero_conv(unshuffled, out_channels) if unshuffled % out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features to moments, see the class."""
        y = F.pixel_unshuffle(x, self.scale)
        y = self.shortcut(y) if self.shortcut else y.unflatten(1, (self.out_channels, -1)).mean(dim=2)
        return y + (self.conv(x) if self.strided else F.pixel_unshuffle(self.conv(x), self.scale))


class UpBlock(nn.Module):
    """``[B, in, h, w] -> [B, out, s h, s w]``: convolution and pixel-shuffle, plus a shortcut.

    The shortcut repeats channels; where they do not divide evenly it is a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        shuffled = out_channels * scale**2
        self.conv = nn.Conv2d(in_channels, shuffled, 3, padding=1)
        self.repeats = shuffled // in_channels
        self.shortcut = _zero_conv(in_channels, shuffled) if shuffled % in_channels else None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Latent to features, see the class."""
        y = self.shortcut(z) if self.shortcut else z.repeat_interleave(self.repeats, dim=1)
        return F.pixel_shuffle(self.conv(z) + y, self.scale)


def _zero_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.zeros_(conv.weight)
    return conv
