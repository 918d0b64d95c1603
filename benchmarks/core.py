"""The models in bare torch, with random weights: what is timed does not depend on their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from davae_core.adapter import Adapter, merge, zero_adapter
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.tiny_decoder import TinyDecoder, TinyDecoderConfig

from .setup import TEXT_TOKENS, Setup

LATENT = LatentSpec()
SD3_TINY_WIDTHS = (64, 64, 48, 24, 16)  # those of the recipe sd3_tiny_decoder


def adapted_config(setup: Setup) -> MMDiTConfig:
    """The native model's with 32 channels in and out."""
    return replace(setup.mmdit(), in_channels=LATENT.channels, out_channels=LATENT.channels)


@cache
def native_state(setup: Setup) -> dict[str, torch.Tensor]:
    """Weights of the unadapted model, on the CPU; made one by one, for all of them twice would not fit everywhere."""
    with torch.device("meta"):
        shapes = MMDiT(setup.mmdit()).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.empty(tensor.shape).normal_(std=0.02, generator=generator).to(setup.torch_dtype)
        for name, tensor in shapes.items()
    }


@cache
def adapter(setup: Setup) -> Adapter:
    """An adapter that changes all it can, as a trained one does."""
    generator = torch.Generator().manual_seed(1)
    blank = zero_adapter(setup.mmdit(), LATENT, setup.rank, generator=generator)
    state = {
        name: tensor if tensor.ndim == 0 or tensor.any() else torch.randn(tensor.shape, generator=generator) * 0.01
        for name, tensor in blank.state.items()
    }
    return Adapter(blank.config, state)


@cache
def native(setup: Setup) -> MMDiT:
    """The unadapted model on its device."""
    return _network(setup.mmdit(), native_state(setup), setup)


@cache
def adapted(setup: Setup) -> MMDiT:
    """The adapted model on its device: LoRA merged, embedder and head fused, untouched weights those of the other."""
    return _network(adapted_config(setup), merge(native_state(setup), adapter(setup)), setup)


def _network(config: MMDiTConfig, state: dict[str, torch.Tensor], setup: Setup) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(config)
    model.load_state_dict(state, assign=True)
    return model.to(setup.device).eval().requires_grad_(False)


@cache
def davae(setup: Setup) -> DAVAE:
    """A DA-VAE at the width of the SD3 VAE."""
    torch.manual_seed(2)
    return DAVAE(DAVAEConfig()).to(setup.device, setup.torch_dtype).eval().requires_grad_(False)


@cache
def sd3_vae(setup: Setup) -> Autoencoder:
    """An autoencoder in the shapes of the SD3 VAE."""
    torch.manual_seed(3)
    return Autoencoder(AutoencoderConfig()).to(setup.device, setup.torch_dtype).eval().requires_grad_(False)


def noise(setup: Setup, *shape: int) -> torch.Tensor:
    """Normal numbers on the device, the same at each call."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*shape, generator=generator).to(setup.device, setup.torch_dtype)


def latent_shape(setup: Setup, is_adapted: bool, size: int) -> tuple[int, int, int, int]:
    """Of pictures of ``size`` x ``size`` px."""
    channels, factor = (LATENT.channels, LATENT.factor) if is_adapted else (LATENT.base_channels, LATENT.base_factor)
    return setup.batch, channels, size // factor, size // factor


@cache
def tiny_decoder(setup: Setup) -> TinyDecoder:
    """A tiny decoder of the widths that the recipe for SD3.5 has."""
    torch.manual_seed(6)
    model = TinyDecoder(TinyDecoderConfig(LATENT, SD3_TINY_WIDTHS))
    return model.to(setup.device, setup.torch_dtype).eval().requires_grad_(False)


def model_call(
    model: MMDiT, setup: Setup, is_adapted: bool, size: int, guided: bool = True
) -> Callable[[], torch.Tensor]:
    """One call; with CFG the latents twice, with two texts."""
    _, channels, height, width = latent_shape(setup, is_adapted, size)
    batch = 2 * setup.batch if guided else setup.batch
    x = noise(setup, batch, channels, height, width)
    context = noise(setup, batch, TEXT_TOKENS, model.config.context)
    pooled = noise(setup, batch, model.config.pooled)
    t = torch.full((batch,), 0.5, device=setup.device)
    return lambda: model(x, t, context, pooled)
