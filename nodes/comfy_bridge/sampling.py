"""Sampling with an adapted MODEL through ComfyUI's own sampler, so that it makes the image the stock KSampler makes."""

import logging
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

import nodes as comfy_nodes  # ComfyUI's, not this pack's: that one is imported relatively

from ...davae_core.latent import LatentSpec
from .few_steps import recommended
from .model import require_adapted

# Where neither the user nor the adapter says anything: the authors' settings for SD3.5-medium at 2048 px.
FALLBACK_STEPS, FALLBACK_CFG = 30, 2.5


@dataclass(frozen=True)
class Settings:
    """Sampler settings as in the node's widgets; steps and cfg of 0 mean "as the few-step LoRA on the MODEL recommends,
    or else its adapter", shift 0 "as the MODEL has it"."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    shift: float
    denoise: float


def sampler_names() -> list[str]:
    """The samplers of the stock KSampler, read anew at each call: packs add theirs after this one is imported."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    """Its noise schedules, likewise."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


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
        latent: LATENT with C + D channels, or an empty one of any: ComfyUI gives that the channels of the MODEL.
        settings: the node's widgets.

    Raises:
        DAVAEError: the MODEL is not adapted, the LATENT does not fit, or the CONDITIONING is not the MODEL's.
    """
    told = recommended(model)
    if settings.shift:
        model = ModelSamplingSD3().patch(model, settings.shift)[0]
    steps = settings.steps or told.steps or FALLBACK_STEPS
    cfg = settings.cfg or told.cfg or FALLBACK_CFG
    shift = getattr(model.get_model_object("model_sampling"), "shift", "of another kind")  # not every class has one
    logging.info("DA-VAE: %d steps, cfg %g, shift %s", steps, cfg, shift)
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
