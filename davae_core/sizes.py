"""Images whose sides are no multiple of what the latent needs."""

import torch
import torch.nn.functional as F

from .errors import LatentError


def pad_to_multiple(image: torch.Tensor, multiple: int, mode: str = "replicate") -> torch.Tensor:
    """``[B, H, W, c]`` continued equally on both sides until height and width are multiples.

    Args:
        image: any float tensor of that shape.
        multiple: of pixels.
        mode: ``"replicate"`` repeats the outermost rows and columns, ``"constant"`` adds zeros.
    """
    height, width = (round_up(side, multiple) for side in image.shape[1:3])
    return pad_to(image, height, width, mode)


def pad_to(image: torch.Tensor, height: int, width: int, mode: str = "replicate") -> torch.Tensor:
    """``[B, H, W, c]`` continued equally on both sides to ``[B, height, width, c]``; modes as above."""
    (top, bottom), (left, right) = (both_sides(b - a) for a, b in zip(image.shape[1:3], (height, width), strict=True))
    if not any((top, bottom, left, right)):
        return image
    return F.pad(image.movedim(-1, 1), (left, right, top, bottom), mode=mode).movedim(1, -1)


def centre(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle ``[B, height, width, c]`` of an image: undoes :func:`pad_to_multiple`."""
    (top, _), (left, _) = (both_sides(a - b) for a, b in zip(image.shape[1:3], (height, width), strict=True))
    return image[:, top : top + height, left : left + width]


def crop_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """``[B, H, W, c]`` cut equally on both sides to multiples.

    Raises:
        LatentError: a side is smaller than the multiple.
    """
    height, width = image.shape[1:3]
    if min(height, width) < multiple:
        raise LatentError(
            f"the image is {width} x {height} px; to be cropped it must have at least {multiple} px a side"
        )
    return centre(image, height // multiple * multiple, width // multiple * multiple)


def round_up(side: int, multiple: int) -> int:
    """The next multiple at or above ``side``."""
    return -(-side // multiple) * multiple


def both_sides(extra: int) -> tuple[int, int]:
    """Split surplus pixels between the two sides; an odd one goes to the second."""
    return extra // 2, extra - extra // 2
