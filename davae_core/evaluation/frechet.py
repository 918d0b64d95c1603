"""Frechet distance between two sets of pictures, on features of the VGG-16 of ST-LPIPS. Never to be reported as FID.

A set is described by mean and covariance of 512 features per picture, in float64. With few pictures the distance is
biased upwards: compare figures of equal counts only.
"""

import torch
from torch import nn

from ..errors import DAVAEError
from ..perceptual import load_perceptual

NAME = "frechet-st-vgg"


class Features(nn.Module):
    """Images to 512 numbers each: the last activation of ST-LPIPS's VGG-16, averaged over positions.

    Raises:
        DAVAEError: the package with the weights is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        distance = load_perceptual("st-lpips-vgg")
        self.scaling = distance.get_submodule("scaling_layer")
        self.net = distance.get_submodule("net")

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to ``[B, 512]`` float64."""
        h = self.scaling(x)
        for stage in self.net.children():
            h = stage(h)
        return h.double().mean((2, 3))


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Frechet distance of the normal distributions fitted to features ``[N, F]`` and ``[M, F]``.

    Raises:
        DAVAEError: a set has fewer than two pictures, or the features differ in number.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise DAVAEError(f"a Frechet distance needs two pictures of each kind, got {[*a.shape]} and {[*b.shape]}")
    a, b = a.double(), b.double()
    root = _root(a.T.cov())
    # The trace of the root of S_a S_b is that of the root of S_a^(1/2) S_b S_a^(1/2), which is symmetric.
    mixed = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float((means + a.var(0).sum() + b.var(0).sum() - 2 * mixed).clamp(min=0))


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
