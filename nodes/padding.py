"""The padding of a LATENT: remembered beside it when it is encoded, cut off again when it is decoded.

Other nodes copy a LATENT and put other samples into the copy. A LATENT with padding sees that, and follows: what was
rotated, mirrored, scaled evenly, repeated, taken out of a batch or sampled anew still has its padding, elsewhere
perhaps; what was cropped, joined with another or stretched is no longer the picture that was padded, and nothing is cut
off it.
"""

import logging
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..davae_core.latent import LatentSpec
from ..davae_core.sizes import both_sides, round_up

KEY = "davae_padding"
CELLS = 8  # a side, of what two sizes of a latent are compared by
ALIKE = 0.4  # correlation from which on they are two sizes of one latent


class Box(NamedTuple):
    """A rectangle in an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: torch.Tensor) -> torch.Tensor:
        """Its part of an image ``[B, H, W, c]``."""
        return image[:, self.top : self.top + self.height, self.left : self.left + self.width]


class Turn(NamedTuple):
    """One of the eight ways to lay a picture on itself: mirrored left to right or not, then quarter turns."""

    mirrored: bool
    quarters: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., h, w]`` turned."""
        return torch.rot90(x.flip(-1) if self.mirrored else x, self.quarters, (-2, -1))

    def of_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) turned."""
        return (size[1], size[0]) if self.quarters % 2 else size

    def of_box(self, box: Box, size: tuple[int, int]) -> Box:
        """A box in an image of this (height, width), turned with it."""
        top, left, height, width = box
        if self.mirrored:
            left = size[1] - left - width
        for _ in range(self.quarters):
            top, left, height, width = size[1] - left - width, top, width, height
            size = (size[1], size[0])
        return Box(top, left, height, width)


AS_IT_WAS = Turn(False, 0)
TURNS = [Turn(*way) for way in product((False, True), range(4))]


@dataclass(frozen=True)
class Padding:
    """What is remembered.

    Attributes:
        box: the picture in the padded image.
        size: (height, width) of the padded image.
        shape: (height, width) of the samples that this is about.
        known: for each of them whether it is a picture that was padded, and all of it.
    """

    box: Box
    size: tuple[int, int]
    shape: tuple[int, int]
    known: tuple[bool, ...]

    def after(self, before: Any, samples: Any) -> "Padding":
        """What is remembered when ``samples`` take the place of ``before``."""
        shape, then = (tuple(getattr(z, "shape", ())) for z in (samples, before))
        if len(shape) != 4 or len(then) != 4 or shape[1] != then[1]:
            return replace(self, known=())
        changed = replace(self, shape=shape[2:])
        if shape[2:] == then[2:] and shape[0] != then[0]:
            origins = [next((i for i, old in enumerate(before) if same(old, new)), None) for new in samples]
            return replace(changed, known=tuple(i is not None and self.known[i] for i in origins))
        turn = turned(before, samples)
        if turn is None:
            return replace(changed, known=(False,) * len(samples))
        return replace(changed, box=turn.of_box(self.box, self.size), size=turn.of_size(self.size))


class PaddedLatent(dict):
    """A LATENT whose padding follows its samples."""

    def copy(self) -> "PaddedLatent":
        return PaddedLatent(self)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "samples" and key in self and isinstance(self.get(KEY), Padding):
            super().__setitem__(KEY, self[KEY].after(self[key], value))
        super().__setitem__(key, value)

    def update(self, *other: Any, **more: Any) -> None:
        for key, value in dict(*other, **more).items():
            self[key] = value


def padded_latent(latent: dict[str, Any], size: tuple[int, int], multiple: int) -> dict[str, Any]:
    """The LATENT of an image of this (height, width), padded to multiples of pixels: itself where none was needed."""
    padded = (round_up(size[0], multiple), round_up(size[1], multiple))
    if padded == size:
        return latent
    top, left = (both_sides(b - a)[0] for a, b in zip(size, padded, strict=True))
    count, _, height, width = latent["samples"].shape
    return PaddedLatent({**latent, KEY: Padding(Box(top, left, *size), padded, (height, width), (True,) * count)})


def picture_box(latent: dict[str, Any], spec: LatentSpec) -> Box:
    """Where the picture is in the image that a LATENT is decoded to: all of it, less padding that is known."""
    z, padding = latent["samples"], latent.get(KEY)
    height, width = (side * spec.factor for side in z.shape[2:])
    if not isinstance(padding, Padding):
        return Box(0, 0, height, width)
    if (padding.shape, len(padding.known)) != (tuple(z.shape[2:]), len(z)) or not all(padding.known):
        logging.warning(
            "DA-VAE: the LATENT was cropped, stretched, joined or put into a batch with others after Detail Encode had "
            "padded it; nothing is cut off"
        )
        return Box(0, 0, height, width)
    down, across = height / padding.size[0], width / padding.size[1]
    top, left, rows, columns = padding.box
    return Box(round(top * down), round(left * across), round(rows * down), round(columns * across))


def turned(before: torch.Tensor, after: torch.Tensor) -> Turn | None:
    """How as many pictures lie in ``after`` as they did ``before``: turned over, exactly; or as they were, of the same
    size or scaled evenly. None where they are not whole, or stretched."""
    if len(before) != len(after):
        return None
    exactly = [turn for turn in TURNS if same(turn.of(before), after)]
    if exactly:
        return exactly[0]
    return AS_IT_WAS if before.shape == after.shape or scaled(before, after) else None


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, number by number."""
    return a.shape == b.shape and (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


def scaled(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether ``[B, C, h, w]`` are two sizes of the same pictures, in proportion up to rounding; not one a part of the
    other."""
    sides = list(zip(before.shape[2:], after.shape[2:], strict=True))
    in_proportion = max((b - 1) / a for a, b in sides) < min((b + 1) / a for a, b in sides)
    if not in_proportion or within(before, after) or within(after, before):
        return False
    cells = (min(CELLS, *sides[0]), min(CELLS, *sides[1]))
    small, then = (F.adaptive_avg_pool2d(z.float().cpu(), cells).flatten(2) for z in (after, before))
    small, then = (F.normalize((z - z.mean(dim=2, keepdim=True)).flatten(1), dim=1) for z in (small, then))
    return float((small * then).sum(dim=1).min()) >= ALIKE


def within(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether ``part`` is a rectangle of ``whole``, number by number."""
    height, width = part.shape[2:]
    down, across = whole.shape[2] - height + 1, whole.shape[3] - width + 1
    if down < 1 or across < 1 or (part.dtype, part.device) != (whole.dtype, whole.device):
        return False
    corners = (whole[:, :, :down, :across] == part[:, :, :1, :1]).flatten(0, 1).all(dim=0)
    return any(same(whole[:, :, y : y + height, x : x + width], part) for y, x in corners.nonzero().tolist())
