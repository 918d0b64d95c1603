"""Run the resolution levels of an autoencoder in horizontal strips: the exact result in a fraction of the memory.

Tiles that go through a whole decoder one after another each normalise with their own statistics, which shows as seams
and shifts of colour. Here the layers go one after another, and the *strips* inside each layer: every convolution sees
the true rows above and below its strip, and every group norm the statistics of the whole picture. Nothing has to be
blended, and the order of the strips does not matter. At most two whole activations are held at a time; what is between
them lives as long as one strip.

Attention inside a level sees the whole picture at once, as it does in the middle block, which is no part of this. The
known VAEs have it at their lowest resolution only, where it takes no more memory than the middle block's own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .autoencoder import DecoderTrunk, Downsample, Encoder, Level, ResnetBlock, Upsample

MIN_ROWS = 4
Order = Callable[[list[tuple[int, int]]], Sequence[tuple[int, int]]]


class Source(Protocol):
    """A picture ``[B, c, h, w]`` that is asked for by rows."""

    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``[B, c, stop - start, w]``."""
        ...


class Whole:
    """A picture in memory."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.shape: tuple[int, ...] = tuple(x.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A view."""
        return self.x[:, :, start:stop]


class Upsampled:
    """A picture of twice the size, computed when asked for and never held."""

    def __init__(self, x: torch.Tensor, layer: Upsample) -> None:
        self.x, self.layer = x, layer
        batch, _, height, width = x.shape
        self.shape: tuple[int, ...] = (batch, layer.conv.out_channels, 2 * height, 2 * width)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Computed anew at each call."""
        top, bottom = _halo(start, stop, self.shape[2])
        large = F.interpolate(self.x[:, :, top // 2 : (bottom + 1) // 2], scale_factor=2.0, mode="nearest")
        return _conv(self.layer.conv, large[:, :, top % 2 : top % 2 + bottom - top], start, stop, self.shape[2])


class Strips:
    """The layers of an autoencoder, in strips.

    Args:
        rows: image rows of a strip; a level at 1/k of the size uses 1/k of them, at least 4.
        on_strip: called after each strip; what it raises ends the work.
        order: the order of the strips within a layer, for tests.
    """

    def __init__(self, rows: int, on_strip: Callable[[], None] | None = None, order: Order = list) -> None:
        self.strip_rows, self.on_strip, self.order = rows, on_strip, order

    def decode(self, trunk: DecoderTrunk, h: torch.Tensor) -> torch.Tensor:
        """``trunk.levels(h)``: ``[B, width, h, w]``, which is overwritten, to ``[B, 3, f h, f w]``."""
        source: Source = Whole(h)
        for index, level in reversed(list(enumerate(_levels(trunk.up)))):
            for i, block in enumerate(level.block):
                assert isinstance(block, ResnetBlock)
                h = level.attend(i, self._resnet(block, source, index))
                source = Whole(h)
            if isinstance(level.upsample, Upsample):
                source = Upsampled(h, level.upsample)
        return self._norm_conv(trunk.norm_out, trunk.conv_out, source, 0)[0]

    def encode(self, encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
        """``encoder.levels(x)``: ``[B, 3, H, W]`` to ``[B, width, H/f, W/f]``."""
        h = self._conv(encoder.conv_in, Whole(x), 0)
        for index, level in enumerate(_levels(encoder.down)):
            for i, block in enumerate(level.block):
                assert isinstance(block, ResnetBlock)
                h = level.attend(i, self._resnet(block, Whole(h), index))
            if isinstance(level.downsample, Downsample):
                h = self._downsample(level.downsample.conv, h, index + 1)
        return h

    def _resnet(self, block: ResnetBlock, source: Source, level: int) -> torch.Tensor:
        """A residual block. Overwrites a :class:`Whole` source where the shortcut is the source itself."""
        reuse = isinstance(source, Whole) and isinstance(block.nin_shortcut, nn.Identity)
        h, kept = self._norm_conv(block.norm1, block.conv1, source, level, None if reuse else block.nin_shortcut)
        out = source.x if isinstance(source, Whole) and reuse else kept
        assert out is not None
        scale, shift = self._affine(block.norm2, Whole(h), level)
        for start, stop in self._spans(h.shape[2], level):
            out[:, :, start:stop] += _norm_conv_rows(scale, shift, block.conv2, Whole(h), start, stop)
        return out

    def _norm_conv(
        self, norm: nn.GroupNorm, conv: nn.Conv2d, source: Source, level: int, keep: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Norm, SiLU, convolution; with ``keep`` also that layer (pointwise) of the source."""
        height = source.shape[2]
        scale, shift = self._affine(norm, source, level)
        out: torch.Tensor | None = None
        kept: torch.Tensor | None = None
        for start, stop in self._spans(height, level):
            top, bottom = _halo(start, stop, height)
            rows = source.rows(top, bottom)
            part = _conv(conv, _normalise(rows, scale, shift), start, stop, height)
            out = _whole_like(part, height) if out is None else out
            out[:, :, start:stop] = part
            if keep is not None:
                part = keep(rows[:, :, start - top : stop - top])
                kept = _whole_like(part, height) if kept is None else kept
                kept[:, :, start:stop] = part
        assert out is not None
        return out, kept

    def _conv(self, conv: nn.Conv2d, source: Source, level: int) -> torch.Tensor:
        """A 3x3 convolution."""
        height = source.shape[2]
        out: torch.Tensor | None = None
        for start, stop in self._spans(height, level):
            part = _conv(conv, source.rows(*_halo(start, stop, height)), start, stop, height)
            out = _whole_like(part, height) if out is None else out
            out[:, :, start:stop] = part
        assert out is not None
        return out

    def _downsample(self, conv: nn.Conv2d, x: torch.Tensor, level: int) -> torch.Tensor:
        """A 3x3 convolution of stride 2 that pads on the right and the bottom only; ``level`` is that of the result."""
        height = x.shape[2] // 2
        out: torch.Tensor | None = None
        for start, stop in self._spans(height, level):
            rows = F.pad(x[:, :, 2 * start : 2 * stop + 1], (0, 1, 0, 1 if stop == height else 0))
            part = conv(rows)
            out = _whole_like(part, height) if out is None else out
            out[:, :, start:stop] = part
        assert out is not None
        return out

    def _affine(self, norm: nn.GroupNorm, source: Source, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole picture's group norm as scale and shift, ``[B, c, 1, 1]`` each, in float32."""
        batch, channels, height, _ = source.shape
        mean = square = torch.zeros(())
        rows_seen = 0
        for start, stop in self._spans(height, level):
            rows = source.rows(start, stop).float().unflatten(1, (norm.num_groups, -1))
            variance, part = torch.var_mean(rows, dim=(2, 3, 4), correction=0)  # [B, groups]
            new = stop - start
            if not rows_seen:
                mean, square = part, variance * new
            else:  # merge two sets of moments (Chan et al. 1979), in units of rows
                delta = part - mean
                mean = mean + delta * new / (rows_seen + new)
                square = square + variance * new + delta**2 * rows_seen * new / (rows_seen + new)
            rows_seen += new
        factor = torch.rsqrt(square / height + norm.eps)  # [B, groups]
        scale = norm.weight.float().view(norm.num_groups, -1) * factor[..., None]
        shift = norm.bias.float().view(norm.num_groups, -1) - mean[..., None] * scale
        return scale.view(batch, channels, 1, 1), shift.view(batch, channels, 1, 1)

    def _spans(self, height: int, level: int) -> Iterator[tuple[int, int]]:
        """Rows ``(start, stop)`` of the strips of a level; each is reported when it is done."""
        size = max(self.strip_rows >> level, MIN_ROWS)
        for span in self.order([(start, min(start + size, height)) for start in range(0, height, size)]):
            yield span
            if self.on_strip is not None:
                self.on_strip()


def _levels(modules: nn.ModuleList) -> list[Level]:
    return [module for module in modules if isinstance(module, Level)]


def _halo(start: int, stop: int, height: int) -> tuple[int, int]:
    """The rows a 3x3 convolution reads to give rows ``start ... stop``, as far as there are any."""
    return max(start - 1, 0), min(stop + 1, height)


def _conv(conv: nn.Conv2d, rows: torch.Tensor, start: int, stop: int, height: int) -> torch.Tensor:
    """Rows ``start ... stop`` of a padded 3x3 convolution, given the rows of :func:`_halo`."""
    padded = F.pad(rows, (1, 1, int(start == 0), int(stop == height)))
    return F.conv2d(padded, conv.weight, conv.bias)


def _normalise(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """SiLU of the affine form of a group norm."""
    return F.silu(torch.addcmul(shift, x.float(), scale), inplace=True).to(x.dtype)


def _norm_conv_rows(
    scale: torch.Tensor, shift: torch.Tensor, conv: nn.Conv2d, source: Source, start: int, stop: int
) -> torch.Tensor:
    """Rows ``start ... stop`` of norm, SiLU, convolution."""
    height = source.shape[2]
    return _conv(conv, _normalise(source.rows(*_halo(start, stop, height)), scale, shift), start, stop, height)


def _whole_like(part: torch.Tensor, height: int) -> torch.Tensor:
    """Room for the whole picture that ``part`` is rows of."""
    return part.new_empty(*part.shape[:2], height, part.shape[3])
