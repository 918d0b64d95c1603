"""Losses of the autoencoders: reconstruction, perceptual, KL."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..autoencoder import LOGVAR_RANGE
from ..evaluation.perceptual import load_perceptual


@dataclass(frozen=True)
class ReconstructionConfig:
    """Weights of the losses between an image and its reconstruction."""

    l1: float = 1.0
    """Mean absolute difference."""
    l2: float = 0.0
    """Mean squared difference: helps a model that starts from nothing to find colours."""
    perceptual: float = 1.0
    """Perceptual distance; 0 loads no network."""
    network: Literal["st-lpips-alex", "st-lpips-vgg", "lpips-alex", "lpips-vgg"] = "st-lpips-vgg"
    """The perceptual distance: ST-LPIPS works offline (pip install --no-deps stlpips_pytorch), LPIPS has
    to find its files."""
    kl: float = 1e-7
    """KL divergence from a standard normal, summed over the latent of an image."""


class Reconstruction(nn.Module):
    """The weighted sum of :class:`ReconstructionConfig` and its parts."""

    def __init__(self, config: ReconstructionConfig) -> None:
        super().__init__()
        self.config = config
        self.distance = load_perceptual(config.network).requires_grad_(False) if config.perceptual else None

    def forward(self, x: torch.Tensor, y: torch.Tensor, moments: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of images ``x`` and reconstructions ``y``, ``[B, 3, H, W]``; ``moments [B, 2C, h, w]`` of the latent.

        Returns:
            ``loss`` and, for the log, its parts without their weights.
        """
        config = self.config
        parts = {"l1": (x - y.float()).abs().mean(), "kl": kl_divergence(moments)}
        loss = config.l1 * parts["l1"] + config.kl * parts["kl"]
        if config.l2:
            parts["l2"] = (x - y.float()).square().mean()
            loss = loss + config.l2 * parts["l2"]
        if self.distance is not None:
            parts["perceptual"] = self.distance(x, y).float().mean()
            loss = loss + config.perceptual * parts["perceptual"]
        return {"loss": loss, **parts}


START_LOGVAR = -6.0


@torch.no_grad()
def start_certain(convolution: nn.Conv2d) -> None:
    """Let a new encoder's last layer (means first, then log-variances) start with little noise: a spread of 0.05.

    From a spread of 1 the decoder sees noise alone for hundreds of steps.
    """
    assert convolution.bias is not None
    convolution.bias[convolution.bias.shape[0] // 2 :] += START_LOGVAR


def kl_divergence(moments: torch.Tensor) -> torch.Tensor:
    """From a standard normal, summed over ``[2C, h, w]`` moments (mean, log-variance), averaged over the batch."""
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1).mean()


def sampled(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A sample ``[B, C, h, w]`` of the Gaussian with these moments ``[B, 2C, h, w]``; ``noise`` is standard normal."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean + noise * torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
