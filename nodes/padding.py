"""The padding of a LATENT: remembered beside it when it is encoded, found again when it is decoded.

Other nodes change a LATENT's samples and copy what lies beside them as it is, so the memory says what it belongs to:
the padded size, and a thumbnail of each picture. A latent that was rotated, mirrored or scaled since is recognised by
them, and one that was cropped, joined with another or put into a batch with others is, too: nothing is cut off it.
"""

import logging
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..davae_core.latent import LatentSpec
from ..davae_core.sizes import both_sides, round_up

KEY = "davae_padding"
THUMBNAIL = 8  # cells a side
ALIKE = 0.4  # correlation of two thumbnails from which on they show one picture, sampled or not
CLEARLY = 0.5  # more of it, for a latent to count as turned over


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
        pictures: thumbnails ``[B, cells]``.
    """

    box: Box
    size: tuple[int, int]
    pictures: torch.Tensor


def remembered(z: torch.Tensor, size: tuple[int, int], spec: LatentSpec, multiple: int) -> dict[str, Any]:
    """What to put beside the latent ``z`` of an image of this (height, width), padded to multiples of pixels."""
    padded = (round_up(size[0], multiple), round_up(size[1], multiple))
    if padded == size:
        return {}
    top, left = (both_sides(b - a)[0] for a, b in zip(size, padded, strict=True))
    return {KEY: Padding(Box(top, left, *size), padded, thumbnails(z, spec).flatten(1))}


def picture_box(latent: dict[str, Any], spec: LatentSpec) -> Box:
    """Where the picture is in the image that a LATENT is decoded to: all of it, less padding that is known."""
    z, padding = latent["samples"], latent.get(KEY)
    height, width = (side * spec.factor for side in z.shape[2:])
    everything = Box(0, 0, height, width)
    if not isinstance(padding, Padding):
        return everything
    turn = _turn(z, padding, spec)
    if turn is None:
        logging.warning(
            "DA-VAE: the LATENT was cropped, stretched, joined or put into a batch with others after Detail Encode had "
            "padded it; nothing is cut off"
        )
        return everything
    scale = height / turn.of_size(padding.size)[0]
    return Box(*(round(side * scale) for side in turn.of_box(padding.box, padding.size)))


def _turn(z: torch.Tensor, padding: Padding, spec: LatentSpec) -> Turn | None:
    """How the pictures were turned since they were padded; None where they are not those pictures as a whole."""
    now = (z.shape[2] * spec.factor, z.shape[3] * spec.factor)
    fitting = [turn for turn in TURNS if _in_proportion(now, turn.of_size(padding.size))]
    if not fitting:
        return None
    found = thumbnails(z, spec)
    alike = {turn: _likeness(found, padding.pictures, turn) for turn in fitting}  # for each picture
    best = max(fitting, key=lambda turn: float(alike[turn].mean()))
    if AS_IT_WAS in alike and float(alike[best].mean() - alike[AS_IT_WAS].mean()) < CLEARLY:
        best = AS_IT_WAS
    unchanged = len(found) == len(padding.pictures) and now == best.of_size(padding.size)
    # Another size may be a part of the pictures, or several side by side, and another batch may hold others: only what
    # looks like them is known to be them.
    return best if unchanged or float(alike[best].min()) >= ALIKE else None


def _in_proportion(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] * b[1] == a[1] * b[0]


def _likeness(found: torch.Tensor, pictures: torch.Tensor, turn: Turn) -> torch.Tensor:
    """``[B]``: the correlation of each thumbnail with the likest of those remembered, turned."""
    then = turn.of(pictures.view(len(pictures), *found.shape[1:])).flatten(1)
    return (found.flatten(1) @ then.T).amax(dim=1)


def thumbnails(z: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """``[B, C, 8, 8]`` of the base channels, of mean 0 in each channel and length 1 in all."""
    small = F.adaptive_avg_pool2d(z[:, : spec.base_channels].float(), THUMBNAIL).cpu()
    return F.normalize((small - small.mean(dim=(2, 3), keepdim=True)).flatten(1), dim=1).view_as(small)
