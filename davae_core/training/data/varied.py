"""Pictures turned, mirrored, moved and in exchanged colours, where a set is small.

For networks that say something of a picture's texture and edges, which is as true of the turned picture; not where
captions are learned.
"""

from itertools import permutations

import torch
from torch.nn import functional

from .draws import Draws
from .latents import image_key

COLOURS = tuple(permutations(range(3)))
MOVE = 8  # pixels at most, along each side: half a position of the detail latent of an f8 base
NUMBERS = ("turn", "mirror", "colour", "across", "down")


def varied(images: torch.Tensor, draws: Draws, variants: int = 0) -> torch.Tensor:
    """A variant of each image ``[B, 3, H, W]``, of the same shape; images that are not square are turned by halves.

    Args:
        images: what is varied.
        draws: choose the variants.
        variants: how many an image has: the image itself, and others that its content decides, so that a second pass
            meets them again. 0: another every time.
    """
    if not variants:
        numbers = torch.stack([draws.uniform(name) for name in NUMBERS], dim=1).tolist()
        return torch.stack([_variant(image, *of) for image, of in zip(images, numbers, strict=True)])
    chosen = (draws.uniform("variant") * variants).int().tolist()
    return torch.stack([nth(image, which) for image, which in zip(images, chosen, strict=True)])


def nth(image: torch.Tensor, which: int) -> torch.Tensor:
    """A variant of an image ``[3, H, W]`` that its content decides; 0 is the image itself."""
    if not which:
        return image
    seed = int.from_bytes(image_key(image)[:7], "big") + which
    return _variant(image, *torch.rand(len(NUMBERS), generator=torch.Generator().manual_seed(seed)).tolist())


def _variant(
    image: torch.Tensor, turn: float, mirror: float, colour: float, across: float, down: float
) -> torch.Tensor:
    """The variant of an image ``[3, H, W]`` that numbers in [0, 1) say; at an edge that is moved in it is mirrored."""
    quarters = (0, 1, 2, 3) if image.shape[1] == image.shape[2] else (0, 2)
    new = image[list(COLOURS[int(colour * len(COLOURS))])]
    new = new.flip(2) if mirror < 0.5 else new
    new = torch.rot90(new, quarters[int(turn * len(quarters))], (1, 2))
    height, width = new.shape[1:]
    most = min(MOVE, height - 1, width - 1)
    top, left = (int(number * (2 * most + 1)) for number in (down, across))
    padded = functional.pad(new[None], (most, most, most, most), mode="reflect")[0]
    return padded[:, top : top + height, left : left + width]
