"""Frozen autoencoders at work in little memory: as many images at once as fit, and strips where one is too large.

One rule: the largest activation that is computed at once has at most :data:`LARGEST` numbers. Of the SD3 VAE's encoder
that is four images of 1024 px or one of 2048 px, about 7 GB; of its decoder two of 1024 px. A larger image goes
through in strips (:mod:`davae_core.strips`). The results are the same to rounding. Nothing here is for gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...autoencoder import AutoencoderConfig, Encoder
from ...davae import DAVAE
from ...errors import DAVAEError
from ...strips import Strips

LARGEST = 2**29
STRIP_ROWS = 256

Work = Callable[[torch.Tensor], torch.Tensor]


def encode(davae: DAVAE, x: torch.Tensor) -> torch.Tensor:
    """Images ``[B, 3, H, W]`` to the means of their latents ``[B, C + D, h, w]``, in the autoencoder's units."""
    size = _encoder_numbers(davae.config.base, x)
    return _in_pieces(davae.encode, lambda part: davae.encode_tiled(part, rows=STRIP_ROWS), x, size)


def decode(davae: DAVAE, z: torch.Tensor, detail_strength: float = 1.0) -> torch.Tensor:
    """Latents ``[B, C + D, h, w]`` in the autoencoder's units to images ``[B, 3, H, W]``."""
    pixels = z.shape[-2] * z.shape[-1] * davae.latent.factor**2
    # The last level's input has been enlarged with the channels of the level below.
    size = max(davae.config.base.widths[:2]) * pixels
    return _in_pieces(
        lambda part: davae.decode(part, detail_strength),
        lambda part: davae.decode_tiled(part, detail_strength, rows=STRIP_ROWS),
        z,
        size,
    )


def features(encoder: Encoder, config: AutoencoderConfig, x: torch.Tensor) -> torch.Tensor:
    """:meth:`Encoder.features` of images ``[B, 3, H, W]``."""

    def in_strips(part: torch.Tensor) -> torch.Tensor:
        return encoder.finish(Strips(STRIP_ROWS).encode(encoder, part))

    return _in_pieces(encoder.features, in_strips, x, _encoder_numbers(config, x))


def encode_base(davae: DAVAE, x: torch.Tensor) -> torch.Tensor:
    """:meth:`DAVAE.encode_base` of images ``[B, 3, H, W]``, whose small images are encoded whole."""
    size = _encoder_numbers(davae.config.base, x) // davae.latent.scale**2
    return _in_pieces(davae.encode_base, davae.encode_base, x, size)


def _encoder_numbers(config: AutoencoderConfig, x: torch.Tensor) -> int:
    """How many numbers the largest activation of an encoder has for one of the images."""
    return config.widths[0] * x.shape[-2] * x.shape[-1]


def _in_pieces(whole: Work, in_strips: Work, x: torch.Tensor, numbers: int) -> torch.Tensor:
    """Work on ``x [B, ...]`` of which one has an activation of so many numbers."""
    work, count = (whole, LARGEST // numbers) if numbers <= LARGEST else (in_strips, 1)
    if len(x) <= count:
        return work(x)
    return torch.cat([work(part) for part in x.split(count)])


@contextmanager
def out_of_memory(during: str, advice: str) -> Iterator[None]:
    """Where the memory is not enough inside, say during what, and what to do.

    Raises:
        DAVAEError: in place of what PyTorch raises.
    """
    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(problem):
            raise
        told = " ".join(str(problem).split())[:200]
        raise DAVAEError(f"there is not enough memory {during} ({told}): {advice}") from problem
