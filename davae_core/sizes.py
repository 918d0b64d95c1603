"""Images whose sides are no multiple of what the latent needs."""

import torch
import torch.nn.functional as F

from .errors import LatentError


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """``[B, H, W, c]`` with the last row and column repeated until both sides are multiples."""
    bottom, right = (-side % multiple for side in image.shape[1:3])
    if not (bottom or right):
        return image
    return F.pad(image.movedim(-1, 1), (0, right, 0, bottom), mode="replicate").movedim(1, -1)


def crop_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """``[B, H, W, c]`` cut around its centre to multiples, as ComfyUI's own VAE Encode does.

    Raises:
        LatentError: a side is smaller than the multiple.
    """
    height, width = image.shape[1:3]
    if min(height, width) < multiple:
        raise LatentError(
            f"the image is {width} x {height} px; to be cropped it must have at least {multiple} px a side"
        )
    top, left = (height % multiple) // 2, (width % multiple) // 2
    return image[:, top : top + height // multiple * multiple, left : left + width // multiple * multiple]


def round_up(side: int, multiple: int) -> int:
    """The next multiple at or above ``side``."""
    return -(-side // multiple) * multiple
