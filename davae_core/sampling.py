"""Captions to latents, as ComfyUI draws them: Euler steps over shifted times, classifier-free guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import flow
from .latent import LatentSpec
from .text_encoder import TextEncoder

_SEED_STEP = 1_000_003  # indices of captions stay below it, so that no two seeds share noise


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are for the base model (the shift is ComfyUI's for SD3).

    Attributes:
        shift: time shift of the flow, above 0.
        cfg: guidance scale; 1 for none.
        steps: Euler steps, at least 1.
        detail_cfg: guidance scale of the detail channels; 0 for that of the base.
    """

    shift: float = 3.0
    cfg: float = 1.5
    steps: int = 30
    detail_cfg: float = 0.0

    def scales(self, channels: int, base_channels: int) -> float | torch.Tensor:
        """The guidance scale of each channel, ``[1, channels, 1, 1]``, or one for all."""
        if not self.detail_cfg or self.detail_cfg == self.cfg or channels <= base_channels:
            return self.cfg
        of_channels = [self.cfg] * base_channels + [self.detail_cfg] * (channels - base_channels)
        return torch.tensor(of_channels).view(1, -1, 1, 1)


def encode_captions(text: TextEncoder, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """``context [B, L, context]`` and ``pooled [B, pooled]`` of B captions."""
    tokens = torch.tensor([text.pad(text.tokenize(caption)) for caption in captions])
    return text(tokens.to(text.token_embedding.weight.device))


def initial_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Noise ``[B, *shape]``, drawn on the CPU for each index by itself."""
    generators = (torch.Generator().manual_seed(seed * _SEED_STEP + index) for index in indices)
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


@torch.no_grad()
def sample(
    model: Callable[..., torch.Tensor],
    text: TextEncoder,
    captions: Sequence[str],
    noise: torch.Tensor,
    sampling: Sampling,
) -> torch.Tensor:
    """Latents ``[B, c, h, w]`` in the model's units.

    Args:
        model: called as ``model(x, t, context, pooled)``, for example an :class:`~davae_core.mmdit.MMDiT`.
        text: encodes the captions, and the empty one to guide away from.
        captions: B of them.
        noise: ``[B, c, h, w]``, on the model's device.
        sampling: times and guidance.
    """
    empty = encode_captions(text, [""] * len(captions))
    return sample_encoded(model, encode_captions(text, captions), empty, noise, sampling)


@torch.no_grad()
def sample_encoded(
    model: Callable[..., torch.Tensor],
    asked: tuple[torch.Tensor | None, ...],
    empty: tuple[torch.Tensor | None, ...],
    noise: torch.Tensor,
    sampling: Sampling,
    base_channels: int = LatentSpec.base_channels,
    times: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`sample` of captions and empty ones that are encoded already, as the model reads them after x and t.

    ``base_channels`` are the first of the noise's channels; those after them are detail. ``times`` are those of
    ``sampling`` where none are given; ``noise`` is what the latent is at the first of them.
    """

    def velocity(x: torch.Tensor, t: torch.Tensor, positive: bool) -> torch.Tensor:
        return model(x, t, *(asked if positive else empty))

    cfg = sampling.scales(noise.shape[1], base_channels)
    if isinstance(cfg, torch.Tensor):
        cfg = cfg.to(noise)
    return flow.sample_euler(
        flow.guided(velocity, cfg), noise, flow.sigmas(sampling.steps, sampling.shift) if times is None else times
    )
