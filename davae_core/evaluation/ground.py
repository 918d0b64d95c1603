"""Speckles on white: how much of a white ground a drawing leaves off white."""

import torch
import torch.nn.functional as F

NEAR = 7
TOLERANCE = 8 / 127.5  # 8/255 in a range of 2


def ground(x: torch.Tensor) -> torch.Tensor:
    """Where images ``[B, 3, H, W]`` are white, all within 7x7 pixels included: ``[B, 1, H, W]`` bool."""
    coloured = (x < 1 - 1e-3).any(1, keepdim=True).float()
    return F.max_pool2d(coloured, NEAR, stride=1, padding=NEAR // 2) == 0


def off_white(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Share of the white ground of ``x`` where a channel of ``y`` is off white by more than 8/255.

    Args:
        y: drawings or reconstructions ``[B, 3, H, W]`` in [-1, 1].
        x: their true pictures.

    Returns:
        ``[B]``, in [0, 1]; not a number where the true picture has no white ground.
    """
    where = ground(x)
    off = ((1 - y).amax(1, keepdim=True) > TOLERANCE) & where
    return off.sum((1, 2, 3)) / where.sum((1, 2, 3))
