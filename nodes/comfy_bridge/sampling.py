"""Sampling with an adapted MODEL through ComfyUI's own sampler, so that it makes the image the stock KSampler makes."""

import logging
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

import nodes as comfy_nodes  # ComfyUI's, not this pack's: that one is imported relatively

from ...davae_core.latent import LatentSpec
from .model import check_latent, require_adapted

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS

# Where neither the user nor the adapter says anything: the authors' settings for SD3.5-medium at 2048 px.
FALLBACK_STEPS, FALLBACK_CFG = 30, 2.5


@dataclass(frozen=True)
class Settings:
    """Sampler settings as in the node's widgets; steps, cfg and shift of 0 mean "as the adapter recommends"."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    shift: float
    denoise: float


def latent_spec(model: ModelPatcher, also: str = "") -> LatentSpec:
    """The latent an adapted MODEL works on; a DAVAEError for any other MODEL, see :func:`require_adapted`."""
    return require_adapted(model.model, also).davae_latent


def sample(
    model: ModelPatcher, positive: Any, negative: Any, latent: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """Sample a LATENT.

    Args:
        model: an adapted MODEL.
        positive, negative: CONDITIONING.
        latent: LATENT with C + D channels.
        settings: the node's widgets.

    Raises:
        DAVAEError: the MODEL is not adapted, the LATENT does not fit, or the CONDITIONING is not the MODEL's.
    """
    inner = require_adapted(model.model)
    check_latent(inner, latent["samples"].shape)
    recommended = inner.davae_recommended
    model = with_shift(model, settings.shift, recommended.shift)
    steps = settings.steps or recommended.steps or FALLBACK_STEPS
    cfg = settings.cfg or recommended.cfg or FALLBACK_CFG
    shift = model.get_model_object("model_sampling").shift
    logging.info("DA-VAE: %d steps, cfg %g, shift %g", steps, cfg, shift)
    return comfy_nodes.common_ksampler(  # type: ignore[attr-defined]
        model,
        settings.seed,
        steps,
        cfg,
        settings.sampler,
        settings.scheduler,
        positive,
        negative,
        latent,
        denoise=settings.denoise,
    )[0]


def with_shift(model: ModelPatcher, shift: float, recommended: float) -> ModelPatcher:
    """The MODEL with a time shift: the one asked for, else one already set on the MODEL, else the recommended one."""
    if not shift and "model_sampling" in model.object_patches:
        return model
    chosen = shift or recommended
    return ModelSamplingSD3().patch(model, chosen)[0] if chosen else model
