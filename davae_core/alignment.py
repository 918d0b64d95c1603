"""Detail alignment (arXiv 2603.22125, eq. 3-4): averaged in groups, the detail latent should be the base latent."""

import torch
import torch.nn.functional as F

from .errors import LatentError


def grouped_mean(z_detail: torch.Tensor, base_channels: int) -> torch.Tensor:
    """Reduce D detail channels to C by averaging groups of r = D / C neighbours (eq. 3); has no parameters.

    Args:
        z_detail: ``[B, D, h, w]``, D a multiple of ``base_channels``.
        base_channels: C.

    Returns:
        ``[B, C, h, w]``; channel ``i`` is the mean of channels ``i*r ... i*r + r - 1``.

    Raises:
        LatentError: D is not a multiple of C.
    """
    detail_channels = z_detail.shape[1]
    if detail_channels % base_channels:
        raise LatentError(f"{detail_channels} detail channels cannot be grouped onto {base_channels} base channels")
    return z_detail.unflatten(1, (base_channels, -1)).mean(dim=2)


def alignment_loss(z_detail: torch.Tensor, z_base: torch.Tensor) -> torch.Tensor:
    """Mean squared distance between the grouped mean of the detail latent and the base latent (eq. 4).

    Args:
        z_detail: ``[B, D, h, w]``.
        z_base: ``[B, C, h, w]`` in the base VAE's normalised units (shift and scale applied). It gets no gradient.

    Returns:
        A scalar.

    Raises:
        LatentError: the latents differ in batch or size, or D is not a multiple of C.
    """
    if z_detail.shape[0] != z_base.shape[0] or z_detail.shape[2:] != z_base.shape[2:]:
        raise LatentError(
            f"detail latent {list(z_detail.shape)} and base latent {list(z_base.shape)} are not of one image"
        )
    return F.mse_loss(grouped_mean(z_detail, z_base.shape[1]), z_base.detach())
