"""Rectified flow: noise, time, loss, sampler. x_t = (1 - t) x_0 + t noise, v = noise - x_0, t in [0, 1].

Sources: SD3 (arXiv 2403.03206: shift, logit-normal times) and DA-VAE (arXiv 2603.22125, eq. 12-13: detail schedule).
"""

import math
from collections.abc import Callable

import torch

from .errors import DAVAEError


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The point at time ``t`` ``[B]`` on the line from ``x0`` to ``noise`` (both ``[B, ...]``)."""
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model predicts: the direction from data to noise."""
    return noise - x0


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Move times towards noise for larger images: ``shift t / (1 + (shift - 1) t)``; 1 changes nothing."""
    if not shift > 0:
        raise DAVAEError(f"shift must be above 0, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def detail_weight(step: int, warmup: int) -> float:
    """Weight w(n) of the detail channels in the loss (eq. 12): half a cosine from 0 to 1, then 1."""
    if warmup <= 0 or step >= warmup:
        return 1.0
    return (1 - math.cos(math.pi * step / warmup)) / 2


def min_snr_weight(t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight ``[B]`` of the squared velocity error that weighs the squared error of x_0 by min(SNR, gamma).

    Source: min-SNR (arXiv 2303.09556) as in the release of DA-VAE, where SNR = (1 - t) / t, not squared. The error of
    x_0 is t times that of the velocity.
    """
    return torch.minimum(t * (1 - t), gamma * t**2)


def flow_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    base_channels: int,
    weight: float,
    sample_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared error with the detail channels weighted, normalised by the weighted element count (eq. 13).

    Args:
        prediction, target: ``[B, C + D, h, w]``.
        base_channels: C.
        weight: w(n) in [0, 1].
        sample_weight: ``[B]``, a factor on each sample's error in the loss; 1 when not given.

    Returns:
        The loss, and for the log the plain mean squared error of the base and of the detail channels; scalars.
    """
    error = (prediction.float() - target.float()) ** 2
    base, detail = error[:, :base_channels], error[:, base_channels:]
    plain = base.mean().detach(), detail.mean().detach()
    if sample_weight is not None:
        base, detail = (part * sample_weight.view(-1, 1, 1, 1) for part in (base, detail))
    loss = (base.sum() + weight * detail.sum()) / (base.numel() + weight * detail.numel())
    return loss, *plain


def sigmas(steps: int, shift: float = 1.0) -> torch.Tensor:
    """Sampling times ``[steps + 1]`` from 1 to 0, evenly spaced before the shift."""
    if steps < 1:
        raise DAVAEError(f"steps must be at least 1, got {steps}")
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def sample_euler(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    times: torch.Tensor,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Integrate from noise to data with Euler steps.

    Args:
        model: ``(x [B, ...], t [B]) -> v [B, ...]``.
        x: noise at ``times[0]``.
        times: ``[steps + 1]``, decreasing.
        callback: called as ``(step, predicted x_0)``.
    """
    for i, (now, after) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        v = model(x, torch.full((x.shape[0],), now, device=x.device, dtype=torch.float32))
        if callback is not None:
            callback(i, x - now * v)
        x = x + (after - now) * v
    return x


def guided(
    model: Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor], cfg: float | torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Classifier-free guidance, ``v_negative + cfg (v_positive - v_negative)``; ``model`` is told which is asked.

    Args:
        model: ``(x, t, positive)`` to the velocity.
        cfg: one scale, or one per channel, ``[1, c, 1, 1]``; where all are 1 the negative is not asked.
    """
    plain = bool((torch.as_tensor(cfg) == 1).all())

    def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        positive = model(x, t, True)
        if plain:
            return positive
        negative = model(x, t, False)
        return negative + cfg * (positive - negative)

    return call
