"""Mottle: unevenness where a picture should be flat, which is what makes a drawing look like a water colour."""

import torch
import torch.nn.functional as F

from ..metrics import luma

MEAN, NEAR, SMOOTH = 5, 7, 0.03
GREYS = 127.5  # 1/255 of grey in a range of 2


def roughness(x: torch.Tensor) -> torch.Tensor:
    """What a 5x5 mean leaves over of the grey of images ``[B, 3, H, W]`` in [-1, 1]: ``[B, 1, H, W]``."""
    grey = luma(x)
    return grey - F.avg_pool2d(grey, MEAN, stride=1, padding=MEAN // 2, count_include_pad=False)


def flat(x: torch.Tensor) -> torch.Tensor:
    """Where images ``[B, 3, H, W]`` are flat: nothing rough within 7x7 pixels; ``[B, 1, H, W]`` bool."""
    return F.max_pool2d(roughness(x).abs(), NEAR, stride=1, padding=NEAR // 2) < SMOOTH


def mottle(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Root mean square of the roughness of ``y`` where ``x`` is flat, in 1/255 of grey.

    Args:
        y: drawings or reconstructions ``[B, 3, H, W]`` in [-1, 1].
        x: their true pictures.

    Returns:
        ``[B]``; not a number where the true picture is flat nowhere.
    """
    where = flat(x)
    squares = (roughness(y).square() * where).sum((1, 2, 3))
    return GREYS * (squares / where.sum((1, 2, 3))).sqrt()
