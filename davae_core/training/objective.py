"""What the tasks share of the method: noise and its times, the losses of autoencoders, statistics of latents."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .. import bounds, flow
from ..autoencoder import LOGVAR_RANGE
from ..perceptual import PerceptualDistance, load_perceptual
from .data.draws import Draws


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow: which times are trained, and how prompts are left out."""

    shift: float = 3.0
    """Moves times towards noise: more for larger images."""
    time_mean: float = 0.0
    """Mean of the normal variable whose logistic function is the time, before the shift."""
    time_std: float = 1.0
    """Its standard deviation."""
    prompt_dropout: float = 0.1
    """Share of prompts replaced by an empty one, for classifier-free guidance."""
    word_dropout: float = 0.0
    """Share of words left out of the other prompts, so that each comes to mean something by itself: for models of few
    captions."""
    min_snr: float = 0.0
    """Gamma of the min-SNR weighting of times; 0 for none."""

    def __post_init__(self) -> None:
        bounds.at_least_0("flow.shift", self.shift)  # 0 is the shift of the steps, where a stage has steps
        bounds.require("flow.time-mean", self.time_mean, math.isfinite(self.time_mean), "a finite number")
        bounds.at_least_0("flow.time-std", self.time_std)
        bounds.share("flow.prompt-dropout", self.prompt_dropout)
        bounds.share("flow.word-dropout", self.word_dropout)
        bounds.at_least_0("flow.min-snr", self.min_snr)


@dataclass(frozen=True)
class Noised:
    """A batch on its way to noise: the point at time ``t``, what the model should predict there, and the weights."""

    x: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None


def noised(x0: torch.Tensor, draws: Draws, config: FlowConfig) -> Noised:
    """Noise ``x0 [B, c, h, w]`` at times drawn per sample."""
    noise = draws.normal("noise", x0)
    t = flow.shift_time(torch.sigmoid(config.time_mean + config.time_std * draws.gaussian("time")), config.shift)
    t = t.to(x0.device)
    weight = flow.min_snr_weight(t, config.min_snr) if config.min_snr else None
    return Noised(flow.add_noise(x0, noise, t), t, flow.velocity(x0, noise), weight)


@dataclass(frozen=True)
class ReconstructionConfig:
    """Weights of the losses between an image and its reconstruction."""

    l1: float = 1.0
    """Mean absolute difference."""
    l2: float = 0.0
    """Mean squared difference: helps a model that starts from nothing to find colours."""
    gradient: float = 0.0
    """Mean absolute difference of what neighbouring pixels differ by, along both sides: against speckle on even ground
    and blurred edges."""
    perceptual: float = 1.0
    """Perceptual distance; 0 loads no network."""
    network: Literal["st-lpips-alex", "st-lpips-vgg", "lpips-alex", "lpips-vgg"] = "st-lpips-vgg"
    """The perceptual distance: ST-LPIPS works offline (pip install --no-deps stlpips_pytorch), LPIPS has
    to find its files."""
    kl: float = 1e-7
    """KL divergence from a standard normal, summed over the latent of an image."""


class Reconstruction(nn.Module):
    """The weighted sum of :class:`ReconstructionConfig` and its parts.

    Args:
        config: the weights.
        distance: the perceptual distance; loaded as ``config`` says where it is not given.
    """

    def __init__(self, config: ReconstructionConfig, distance: PerceptualDistance | None = None) -> None:
        super().__init__()
        self.config = config
        self.distance = None
        if config.perceptual:
            self.distance = (distance or load_perceptual(config.network)).requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, moments: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Losses of images ``x`` and reconstructions ``y``, ``[B, 3, H, W]``; ``moments [B, 2C, h, w]`` of the latent,
        where it is trained.

        Returns:
            ``loss`` and, for the log, its parts without their weights.
        """
        config = self.config
        parts = {"l1": (x - y.float()).abs().mean()}
        loss = config.l1 * parts["l1"]
        if moments is not None:
            parts["kl"] = kl_divergence(moments)
            loss = loss + config.kl * parts["kl"]
        if config.l2:
            parts["l2"] = (x - y.float()).square().mean()
            loss = loss + config.l2 * parts["l2"]
        if config.gradient:
            apart = x - y.float()
            parts["gradient"] = apart.diff(dim=-1).abs().mean() + apart.diff(dim=-2).abs().mean()
            loss = loss + config.gradient * parts["gradient"]
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


def statistics(latents: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel, ``[C]`` each, of latents ``[B, C, h, w]``; in float64 inside."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for z in latents:
        z = z.detach().double().cpu()
        count += z.numel() // z.shape[1]
        total = total + z.sum(dim=(0, 2, 3))
        squares = squares + (z**2).sum(dim=(0, 2, 3))
    mean = total / count
    return mean.float(), (squares / count - mean**2).clamp(min=1e-12).sqrt().float()
