"""What other packages offer for the same work: diffusers' SD3 transformer, and the decoder of DC-AE."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import core
from .cost import Cost, count
from .setup import TEXT_TOKENS, Setup


def available() -> bool:
    """Whether diffusers is installed."""
    return importlib.util.find_spec("diffusers") is not None


@cache
def transformer(setup: Setup) -> Any:
    """diffusers' SD3 transformer with the weights of :func:`core.native`."""
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    state = core.native_state(setup)
    config = setup.mmdit()
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=config.grid,
            patch_size=config.patch,
            in_channels=config.in_channels,
            num_layers=config.depth,
            attention_head_dim=64,
            num_attention_heads=config.heads,
            joint_attention_dim=config.context,
            caption_projection_dim=config.hidden,
            pooled_projection_dim=config.pooled,
            out_channels=config.out_channels,
            pos_embed_max_size=config.grid,
            dual_attention_layers=config.dual_attention,
            qk_norm="rms_norm",
        )
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(state)), assign=True)
    return model.to(setup.device).eval().requires_grad_(False)


def transformer_call(setup: Setup, size: int) -> Callable[[], torch.Tensor]:
    """One call with CFG, of the same inputs as :func:`core.model_call`."""
    model, config = transformer(setup), setup.mmdit()
    _, channels, height, width = core.latent_shape(setup, False, size)
    batch = 2 * setup.batch
    inputs = {
        "hidden_states": core.noise(setup, batch, channels, height, width),
        "encoder_hidden_states": core.noise(setup, batch, TEXT_TOKENS, config.context),
        "pooled_projections": core.noise(setup, batch, config.pooled),
        "timestep": torch.full((batch,), 500.0, device=setup.device),
    }
    return lambda: model(**inputs, return_dict=False)[0]


def _dc_ae() -> Any:
    """DC-AE f32c32 in the shapes of the one that SANA uses (its published configuration)."""
    from diffusers import AutoencoderDC

    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths = (128, 256, 512, 512, 1024, 1024)
    scales = ((), (), (), (5,), (5,), (5,))
    return AutoencoderDC(
        in_channels=3,
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


@cache
def dc_ae(setup: Setup) -> Any:
    """DC-AE f32c32 with random weights."""
    torch.manual_seed(6)
    return _dc_ae().to(setup.device, setup.torch_dtype).eval().requires_grad_(False)


def dc_ae_decode(setup: Setup, size: int) -> Callable[[], torch.Tensor]:
    """One decode."""
    model = dc_ae(setup)
    z = core.noise(setup, setup.batch, 32, size // 32, size // 32)
    return lambda: model.decode(z, return_dict=False)[0]


def dc_ae_cost(setup: Setup, size: int) -> Cost:
    """Of :func:`dc_ae_decode`."""

    def make() -> Callable[[], object]:
        model = _dc_ae()
        z = torch.empty(setup.batch, 32, size // 32, size // 32)
        return lambda: model.decode(z, return_dict=False)[0]

    return count(make, setup.torch_dtype)
