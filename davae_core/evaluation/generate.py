"""Captions to images, in batches, as ComfyUI draws them: Euler steps over shifted times, classifier-free guidance.

The noise of a caption depends on the seed and the caption's index alone, not on the batch it is drawn in; and the base
model starts from the base channels of the adapted model's noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from .. import flow
from ..errors import DAVAEError
from ..mmdit import MMDiT
from ..sampling import Sampling, initial_noise, sample_encoded
from .family import Family


@dataclass(frozen=True)
class Prompt:
    """A caption to draw: its text, and its index among all captions, which with the seed decides its noise."""

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


def adapted_latents(family: Family, prompts: Sequence[Prompt], seed: int, sampling: Sampling) -> torch.Tensor:
    """Latents of the adapted model in the autoencoder's units, ``[B, C + D, h, w]``."""
    return family.latent.denormalise(_latents(family, family.adapted, prompts, seed, sampling, family.latent.channels))


def base_latents(family: Family, prompts: Sequence[Prompt], seed: int, sampling: Sampling) -> torch.Tensor:
    """Latents of the base model in the base VAE's units, ``[B, C, h, w]``."""
    spec = family.latent
    return spec.denormalise_base(_latents(family, family.base, prompts, seed, sampling, spec.base_channels))


@torch.no_grad()
def painted_over(
    family: Family, prompts: Sequence[Prompt], z: torch.Tensor, seed: int, sampling: Sampling, denoise: float
) -> torch.Tensor:
    """Latents of the adapted model that begins from ``z`` instead of noise, as a sampler in ComfyUI does it.

    Args:
        z: ``[B, C + D, h, w]`` in the autoencoder's units.
        sampling: its steps are those that are done.
        denoise: above 0 to 1: the share of all steps' times that are left; at 1 nothing of ``z`` stays.

    Returns:
        As ``z``.
    """
    spec = family.latent
    times = flow.sigmas(max(int(sampling.steps / denoise), sampling.steps), sampling.shift)[-sampling.steps - 1 :]
    noise = initial_noise(seed, [prompt.index for prompt in prompts], tuple(z.shape[1:])).to(z)
    begun = flow.add_noise(spec.normalise(z), noise, times[:1].to(z).expand(len(z)))
    asked, empty = family.encode([prompt.caption for prompt in prompts]), family.encode([""] * len(prompts))
    return spec.denormalise(
        sample_encoded(family.adapted, asked, empty, begun, sampling, spec.base_channels, times=times)
    )


def _latents(
    family: Family, model: MMDiT, prompts: Sequence[Prompt], seed: int, sampling: Sampling, channels: int
) -> torch.Tensor:
    """The first ``channels`` of the noise of each prompt, sampled."""
    side = image_size(family) // family.latent.factor
    noise = initial_noise(seed, [prompt.index for prompt in prompts], (family.latent.channels, side, side))
    noise = noise[:, :channels].to(family.device)
    asked, empty = family.encode([prompt.caption for prompt in prompts]), family.encode([""] * len(prompts))
    return sample_encoded(model, asked, empty, noise, sampling, family.latent.base_channels)


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
