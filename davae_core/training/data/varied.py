"""Pictures turned, mirrored and in exchanged colours: forty-eight of each, where a set is small.

For networks that say something of a picture's texture and edges, which is as true of the turned picture; not where
captions are learned.
"""

from itertools import permutations

import torch

from .draws import Draws

COLOURS = tuple(permutations(range(3)))


def varied(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A variant of each image ``[B, 3, H, W]``, of the same shape; images that are not square are turned by halves."""
    turns, mirror, colours = (draws.uniform(name).tolist() for name in ("turn", "mirror", "colour"))
    quarters = (0, 1, 2, 3) if images.shape[2] == images.shape[3] else (0, 2)
    out = []
    for image, turn, mirrored, colour in zip(images, turns, mirror, colours, strict=True):
        new = image[list(COLOURS[int(colour * len(COLOURS))])]
        new = new.flip(2) if mirrored < 0.5 else new
        out.append(torch.rot90(new, quarters[int(turn * len(quarters))], (1, 2)))
    return torch.stack(out)
