"""Noise to picture, decode included, by each of the ways a user has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from davae_core.flow import sample_euler, sigmas
from davae_core.mmdit import MMDiT

from . import core, route
from .setup import TEXT_TOKENS, Setup

CFG, SHIFT = 2.5, 3.0


def native(setup: Setup, size: int, comfy: bool, enlarge: int = 1) -> Callable[[], Any]:
    """The unadapted model and the SD3 VAE."""
    one = replace(setup, batch=1)
    if comfy:
        return route.picture(setup, route.native(one), route.sd3_vae(one), False, size, enlarge)
    vae = core.sd3_vae(one)
    draw = _sampled(core.native(one), setup, False, size)

    def picture() -> torch.Tensor:
        z = draw() / core.LATENT.base_scale + core.LATENT.base_shift
        x = vae.decode(z)
        return F.interpolate(x, scale_factor=float(enlarge), mode="bicubic") if enlarge > 1 else x

    return picture


def half(setup: Setup, size: int, comfy: bool) -> Callable[[], Any]:
    """The unadapted model at half the size, enlarged."""
    return native(setup, size // 2, comfy, enlarge=2)


def adapted(setup: Setup, size: int, comfy: bool) -> Callable[[], Any]:
    """The adapted model and the DA-VAE."""
    one = replace(setup, batch=1)
    if comfy:
        return route.picture(setup, route.adapted(one), None, True, size, davae=route.davae(one))
    davae = core.davae(one)
    draw = _sampled(core.adapted(one), setup, True, size)
    return lambda: davae.decode(core.LATENT.denormalise(draw()))


def _sampled(model: MMDiT, setup: Setup, is_adapted: bool, size: int) -> Callable[[], torch.Tensor]:
    """Noise to latent, in the model's units."""
    noise = core.noise(setup, *core.latent_shape(setup, is_adapted, size))
    batch, config = 2 * setup.batch, model.config
    context = core.noise(setup, batch, TEXT_TOKENS, config.context)
    pooled = core.noise(setup, batch, config.pooled)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """With guidance, both texts in one call, as ComfyUI does."""
        both = model(torch.cat([x, x]), torch.cat([t, t]), context, pooled)
        positive, negative = both.chunk(2)
        return negative + CFG * (positive - negative)

    return lambda: sample_euler(velocity, noise, sigmas(setup.steps, SHIFT))
