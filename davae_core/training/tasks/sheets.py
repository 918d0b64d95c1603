"""Sample sheets of the run's own prompts."""

from collections.abc import Callable, Sequence

import torch

from ...images import mosaic
from ..run.validation import SHEET_IMAGES
from ..text.asked import Asked


def drawn(
    asked: Sequence[Asked], like: torch.Tensor, draw: Callable[[str, int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The pictures of all prompts, in lines of :data:`SHEET_IMAGES`, ``[3, H, W]``; on the CPU, one after another.

    Args:
        asked: prompts and seeds.
        like: a latent ``[1, c, h, w]`` of the size to draw.
        draw: prompt, seed and ``like`` to an image ``[1, 3, h, w]``.
    """
    pictures = [draw(one.prompt, one.seed, like).cpu() for one in asked]
    return mosaic(torch.cat(pictures), min(SHEET_IMAGES, len(asked)))
