"""Run the resolution levels of an autoencoder in horizontal strips: the exact result in a fraction of the memory.

Tiles that go through a whole decoder one after another each normalise with their own statistics, which shows as seams
and shifts of colour. Here the layers go one after another, and the *strips* inside each layer: every convolution sees
the true rows above and below its strip, and every group norm the statistics of the whole picture. Nothing has to be
blended, and the order of the strips does not matter.

What is held at a time: below full size the two activations of a residual block; at full size, where they are largest,
one alone. It is replaced strip by strip, and what lies between its two convolutions is computed twice, once for the
statistics and once for the result. An enlarged picture is computed when it is asked for, from the small one.

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


class Window:
    """Some rows of a picture: ``x`` is the rows from ``top`` on of a picture ``height`` rows high."""

    def __init__(self, x: torch.Tensor, top: int, height: int) -> None:
        self.x, self.top = x, top
        self.shape: tuple[int, ...] = (*x.shape[:2], height, x.shape[3])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A view; the rows must be among those there are."""
        return self.x[:, :, start - self.top : stop - self.top]


class Upsampled:
    """A picture of twice the size, computed when asked for and never held; see :class:`Upsample`."""

    def __init__(self, x: torch.Tensor, layer: Upsample) -> None:
        self.x, self.layer, self.weights = x, layer, layer.position_weights()
        batch, _, height, width = x.shape
        self.shape: tuple[int, ...] = (batch, layer.conv.out_channels, 2 * height, 2 * width)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Computed anew at each call."""
        first, last, height = start // 2, (stop + 1) // 2, self.x.shape[2]  # rows of the small picture
        top, bottom = _halo(first, last, height)
        small = F.pad(self.x[:, :, top:bottom], (1, 1, int(first == 0), int(last == height)))
        large = self.layer.enlarge(small, self.weights)
        return large[:, :, start % 2 : start % 2 + stop - start]


class Convolved:
    """Norm (as scale and shift), SiLU and a 3x3 convolution of a picture, computed when asked for and never held."""

    def __init__(self, source: Source, scale: torch.Tensor, shift: torch.Tensor, conv: nn.Conv2d) -> None:
        self.source, self.scale, self.shift, self.conv = source, scale, shift, conv
        self.shape: tuple[int, ...] = (source.shape[0], conv.out_channels, *source.shape[2:])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Computed anew at each call, from one row more of the source on either side."""
        height = self.shape[2]
        rows = self.source.rows(*_halo(start, stop, height))
        return _conv(self.conv, _normalise(rows, self.scale, self.shift), start, stop, height)


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
                if index > 1:  # small enough to be held rather than computed three times
                    h = self._whole(source, index - 1)
                    source = Whole(h)
        return self._norm_conv(trunk.norm_out, trunk.conv_out, source, 0)

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
        """A residual block. At full size it overwrites a :class:`Whole` source that is its own shortcut."""
        if level == 0 and isinstance(source, Whole) and isinstance(block.nin_shortcut, nn.Identity):
            return self._resnet_in_place(block, source, level)
        h = self._norm_conv(block.norm1, block.conv1, source, level)
        norm2 = self._affine(block.norm2, Whole(h), level)

        def rows(old: Source, start: int, stop: int) -> torch.Tensor:
            part = Convolved(old, *norm2, block.conv2).rows(start, stop)
            return part.add_(block.nin_shortcut(source.rows(start, stop)))

        self._overwrite(h, level, 1, rows)
        return h

    def _resnet_in_place(self, block: ResnetBlock, source: Whole, level: int) -> torch.Tensor:
        """A residual block with one activation in memory instead of two, for half as much work again."""
        norm1 = self._affine(block.norm1, source, level)
        norm2 = self._affine(block.norm2, Convolved(source, *norm1, block.conv1), level)

        def rows(old: Source, start: int, stop: int) -> torch.Tensor:
            h = Convolved(old, *norm1, block.conv1)
            return Convolved(h, *norm2, block.conv2).rows(start, stop).add_(old.rows(start, stop))

        self._overwrite(source.x, level, 2, rows)
        return source.x

    def _overwrite(
        self, x: torch.Tensor, level: int, reach: int, new_rows: Callable[[Source, int, int], torch.Tensor]
    ) -> None:
        """Replace a picture strip by strip, in any order.

        Args:
            x: the picture.
            level: its resolution level.
            reach: how many old rows a strip needs on either side, at most 2; those around each cut are set aside.
            new_rows: given the old picture, makes rows ``start ... stop`` of the new one.
        """
        height = x.shape[2]
        cuts = [start for start, _ in self._cut(height, level) if start]
        old = {cut: x[:, :, cut - reach : cut + reach].clone() for cut in cuts}
        for start, stop in self._spans(height, level):
            parts = [x[:, :, start:stop]]
            if start:
                parts.insert(0, old[start][:, :, :reach])
            if stop < height:
                parts.append(old[stop][:, :, reach:])
            window = Window(torch.cat(parts, dim=2), max(start - reach, 0), height)
            x[:, :, start:stop] = new_rows(window, start, stop)

    def _norm_conv(self, norm: nn.GroupNorm, conv: nn.Conv2d, source: Source, level: int) -> torch.Tensor:
        """Norm, SiLU, convolution."""
        return self._whole(Convolved(source, *self._affine(norm, source, level), conv), level)

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

    def _whole(self, source: Source, level: int) -> torch.Tensor:
        """A picture that is asked for by rows, in memory."""
        out: torch.Tensor | None = None
        for start, stop in self._spans(source.shape[2], level):
            part = source.rows(start, stop)
            out = _whole_like(part, source.shape[2]) if out is None else out
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
        """Rows ``(start, stop)`` of the strips of a level, in :attr:`order`; each is reported when it is done."""
        for span in self.order(self._cut(height, level)):
            yield span
            if self.on_strip is not None:
                self.on_strip()

    def _cut(self, height: int, level: int) -> list[tuple[int, int]]:
        """Rows ``(start, stop)`` of the strips of a level, from top to bottom."""
        size = max(self.strip_rows >> level, MIN_ROWS)
        return [(start, min(start + size, height)) for start in range(0, height, size)]


def _levels(modules: nn.ModuleList) -> list[Level]:
    return [module for module in modules if isinstance(module, Level)]


def _halo(start: int, stop: int, height: int) -> tuple[int, int]:
    """The rows a 3x3 convolution reads to give rows ``start ... stop``, as far as there are any."""
    return max(start - 1, 0), min(stop + 1, height)


def _conv(conv: nn.Conv2d, rows: torch.Tensor, start: int, stop: int, height: int) -> torch.Tensor:
    """Rows ``start ... stop`` of a padded 3x3 convolution, given the rows of :func:`_halo`."""
    if start == 0 or stop == height:
        rows = F.pad(rows, (0, 0, int(start == 0), int(stop == height)))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _normalise(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """SiLU of the affine form of a group norm."""
    return F.silu(torch.addcmul(shift, x.float(), scale), inplace=True).to(x.dtype)


def _whole_like(part: torch.Tensor, height: int) -> torch.Tensor:
    """Room for the whole picture that ``part`` is rows of."""
    return part.new_empty(*part.shape[:2], height, part.shape[3])
