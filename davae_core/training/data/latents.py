"""Latents of images are computed once: kept in memory by content, or on disk by what they were made of."""

import hashlib
from collections.abc import Callable

import torch

from . import cutting
from .listing import Source

Encode = Callable[[torch.Tensor], torch.Tensor]
Latents = Callable[[str], torch.Tensor]
"""A key of :func:`latent_key` to the latent ``[c, h, w]``, float32 in the model's units."""

KEYS = "source, crop, flip"  # what a key tells of; another word wherever images are read or cut in another way


def latent_key(source: Source, shape: tuple[int, int], mirrored: bool) -> str:
    """The name of the latent of an image that is cut to ``shape`` (width, height) at the centre.

    Args:
        source: the image; its pixels are not read.
        shape: what it is cut to.
        mirrored: whether it is then mirrored.
    """
    size = cutting.covering(source.size, shape)
    told = f"{source.identity} {size} {shape} centre {mirrored}"
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def image_key(image: torch.Tensor) -> bytes:
    """Tells images ``[3, H, W]`` apart by their content."""
    return hashlib.blake2b(image.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()


class LatentCache:
    """Encodes images, and remembers the latent of each by the image's content.

    What it keeps it encodes one by one: the last bits of a latent depend on the size of the batch, so a resumed run,
    which knows no latents yet, would otherwise go on with slightly different ones.

    Args:
        encode: ``[B, 3, H, W]`` in [-1, 1] to ``[B, c, h, w]``; called without gradients.
        keep: remember; without it every image is encoded every time. Costs memory: the latent of every image.
    """

    def __init__(self, encode: Encode, keep: bool) -> None:
        self.encode, self.keep = encode, keep
        self.known: dict[bytes, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The latents of images ``[B, 3, H, W]``."""
        if not self.keep:
            return self.encode(x)
        keys = [image_key(image) for image in x]
        for i, key in enumerate(keys):
            if key not in self.known:
                self.known[key] = self.encode(x[i : i + 1])[0].cpu().clone()
        return torch.stack([self.known[key] for key in keys]).to(x.device)
