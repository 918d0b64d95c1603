"""How good models are on images that they were not trained on: reconstructions, and velocities by noise level.

Images, noise and times are fixed, so that figures can be compared over a training and between models.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from . import flow
from .metrics import psnr
from .perceptual import PerceptualDistance
from .sampling import initial_noise

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)

Predict = Callable[[torch.Tensor, torch.Tensor, Sequence[str]], torch.Tensor]
Reconstruct = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]


@torch.no_grad()
def velocity_errors(
    predict: Predict,
    latents: Iterable[tuple[torch.Tensor, Sequence[str]]],
    groups: Mapping[str, slice],
    times: Sequence[float] = TIMES,
    seed: int = 0,
) -> dict[str, float]:
    """Mean squared error of the predicted velocity, by group of channels and time.

    Args:
        predict: ``(x [B, c, h, w], t [B], B captions) -> v [B, c, h, w]``.
        latents: latents ``[B, c, h, w]`` in the model's units, and their captions; B is what is computed at once.
        groups: name to channels, for example ``{"base": slice(0, 16), "detail": slice(16, None)}``.
        times: noise levels in (0, 1]; 1 is noise alone.
        seed: of the noise; that of an image depends on the seed and its place among all images alone.

    Returns:
        ``{"base/t0.1": ..., "base": ..., "images": count}``: for each group the mean over images at each time, and
        the mean over times. Without images only the count.
    """
    sums = {name: torch.zeros(len(times), dtype=torch.float64) for name in groups}
    count = 0
    for z, captions in latents:
        noise = initial_noise(seed, range(count, count + len(z)), z.shape[1:]).to(z.device)
        count += len(z)
        for i, time in enumerate(times):
            t = torch.full((len(z),), time, device=z.device)
            v = predict(flow.add_noise(z, noise, t), t, captions)
            error = (v.float() - flow.velocity(z, noise).float()).square()
            for name, channels in groups.items():
                sums[name][i] += error[:, channels].mean((1, 2, 3)).double().sum().cpu()
    out = {"images": float(count)}
    for name, total in sums.items():
        if count:
            out |= {f"{name}/t{time:g}": float(value / count) for time, value in zip(times, total, strict=True)}
            out[name] = float(total.mean() / count)
    return out


@torch.no_grad()
def reconstruction_errors(
    images: Iterable[torch.Tensor], reconstruct: Reconstruct, distances: Sequence[PerceptualDistance]
) -> dict[str, dict[str, float]]:
    """Mean PSNR and mean perceptual distances over all images, for each kind of reconstruction.

    Args:
        images: ``[B, 3, H, W]`` in [-1, 1] each.
        reconstruct: images to reconstructions of the same shape, by kind.
        distances: on the device of the images; computed in float32, whatever the precision outside.

    Returns:
        ``{"davae": {"psnr": dB, "st-lpips-alex": ...}, ...}``; empty without images.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for x in images:
        for kind, y in reconstruct(x).items():
            y = y.float().clamp(-1, 1)
            told = values.setdefault(kind, {})
            told.setdefault("psnr", []).extend(psnr(y, x).tolist())
            with torch.autocast(x.device.type, enabled=False):
                for distance in distances:
                    told.setdefault(distance.name, []).extend(distance(y, x).tolist())
    return {kind: {name: sum(some) / len(some) for name, some in told.items()} for kind, told in values.items()}


def flat(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """``{"davae": {"psnr": 28.0}}`` as ``{"davae/psnr": 28.0}``."""
    return {f"{kind}/{name}": value for kind, told in figures.items() for name, value in told.items()}
