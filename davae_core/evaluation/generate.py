"""Captions to images, in batches, as ComfyUI draws them: Euler steps over shifted times, classifier-free guidance.

The noise of a caption depends on the seed and the caption's index alone, not on the batch it is drawn in; and the base
model starts from the base channels of the adapted model's noise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from .. import flow
from ..errors import DAVAEError
from ..mmdit import MMDiT
from ..text_encoder import TextEncoder
from .family import Family

_SEED_STEP = 1_000_003  # indices of captions stay below it, so that no two seeds share noise


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are for the base model (the shift is ComfyUI's for SD3).

    Attributes:
        shift: time shift of the flow, above 0.
        cfg: guidance scale; 1 for none.
        steps: Euler steps, at least 1.
    """

    shift: float = 3.0
    cfg: float = 1.5
    steps: int = 30


@dataclass(frozen=True)
class Prompt:
    """One of the captions to draw: its text, and its index among all captions, which decides its noise."""

    index: int
    caption: str


def adapted_sampling(family: Family, steps: int = 0) -> Sampling:
    """What the adapter recommends, with other steps if given.

    Raises:
        DAVAEError: the adapter's file recommends nothing.
    """
    told = family.recommended
    if not (told.shift > 0 and told.cfg > 0 and (steps or told.steps)):
        raise DAVAEError(
            f"the adapter's file does not say how to sample it ({asdict(told)}); save it with shift, cfg and steps"
        )
    return Sampling(told.shift, told.cfg, steps or told.steps)


def image_size(family: Family) -> int:
    """Side of the adapted model's images in pixels; the base model's are 1/s of it.

    Raises:
        DAVAEError: the adapter's file recommends none, or one that the latent cannot have.
    """
    size, factor = family.recommended.size, family.latent.factor
    if size < factor or size % factor:
        raise DAVAEError(f"the adapter's file recommends {size} px; expected a positive multiple of {factor}")
    return size


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
) -> torch.Tensor:
    """:func:`sample` of captions and empty ones that are encoded already, as the model reads them after x and t."""

    def velocity(x: torch.Tensor, t: torch.Tensor, positive: bool) -> torch.Tensor:
        return model(x, t, *(asked if positive else empty))

    return flow.sample_euler(flow.guided(velocity, sampling.cfg), noise, flow.sigmas(sampling.steps, sampling.shift))


def adapted_latents(family: Family, prompts: Sequence[Prompt], seed: int, sampling: Sampling) -> torch.Tensor:
    """Latents of the adapted model in the autoencoder's units, ``[B, C + D, h, w]``."""
    return family.latent.denormalise(_latents(family, family.adapted, prompts, seed, sampling, family.latent.channels))


def base_latents(family: Family, prompts: Sequence[Prompt], seed: int, sampling: Sampling) -> torch.Tensor:
    """Latents of the base model in the base VAE's units, ``[B, C, h, w]``."""
    spec = family.latent
    return spec.denormalise_base(_latents(family, family.base, prompts, seed, sampling, spec.base_channels))


def _latents(
    family: Family, model: MMDiT, prompts: Sequence[Prompt], seed: int, sampling: Sampling, channels: int
) -> torch.Tensor:
    """The first ``channels`` of the noise of each prompt, sampled."""
    side = image_size(family) // family.latent.factor
    noise = initial_noise(seed, [prompt.index for prompt in prompts], (family.latent.channels, side, side))
    noise = noise[:, :channels].to(family.device)
    return sample(model, family.text, [prompt.caption for prompt in prompts], noise, sampling)


@torch.no_grad()
def adapted_images(family: Family, prompts: Sequence[Prompt], seed: int, sampling: Sampling) -> torch.Tensor:
    """``[B, 3, H, W]`` in [-1, 1]: the adapted model's samples, decoded by the DA-VAE."""
    return family.davae.decode(adapted_latents(family, prompts, seed, sampling)).clamp(-1, 1)


@torch.no_grad()
def base_images(family: Family, prompts: Sequence[Prompt], seed: int, sampling: Sampling) -> torch.Tensor:
    """``[B, 3, H/s, W/s]`` in [-1, 1]: the base model's samples, decoded by the base VAE.

    Raises:
        DAVAEError: the DA-VAE holds no base decoder.
    """
    return family.davae.decode_base(base_latents(family, prompts, seed, sampling)).clamp(-1, 1)


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """Slices of at most ``size`` prompts, in order."""
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
