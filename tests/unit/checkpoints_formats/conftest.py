"""Toy models of diffusers' own classes, and files in every layout made from them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from diffusers import AutoencoderKL, SD3Transformer2DModel

from davae_core.checkpoints import convert

Run = Callable[..., list[Path]]

WIDTHS = (32, 32, 64, 64)
LEVELS = len(WIDTHS)
INPUTS_SEED = 5


def shaken(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights drawn afresh, norms included, whose 1 and 0 would hide a mix-up."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            norm = tensor.ndim == 1 and name.endswith("weight")
            spread = 0.2 if tensor.ndim == 1 else 0.5 / tensor[0].numel() ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * spread + float(norm))
    return module.eval()


def make_kl(seed: int, channels: int = 16, quant_conv: bool = False) -> AutoencoderKL:
    kl = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        latent_channels=channels,
        layers_per_block=1,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )
    return shaken(kl, seed)


def make_transformer(seed: int = 1, channels: int = 16) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=128,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return shaken(model, seed)


@pytest.fixture(scope="session")
def kl() -> AutoencoderKL:
    return make_kl(0)


@pytest.fixture(scope="session")
def sd1_kl() -> AutoencoderKL:
    return make_kl(3, channels=4, quant_conv=True)


@pytest.fixture(scope="session")
def transformer() -> SD3Transformer2DModel:
    return make_transformer()


@pytest.fixture
def pipeline(tmp_path: Path, kl: AutoencoderKL, transformer: SD3Transformer2DModel) -> Path:
    """A folder as ``StableDiffusion3Pipeline.save_pretrained`` writes it, transformer in shards."""
    folder = tmp_path / "pipeline"
    transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
    kl.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return folder


@pytest.fixture
def run() -> Run:
    """``run(src, dst, *options)``: the convert command."""

    def convert_(src: Path, dst: Path, *options: object) -> list[Path]:
        return convert.main([str(src), str(dst), *map(str, options)])

    return convert_


@pytest.fixture
def inputs() -> Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """``inputs(channels)``: latent, noise level, text tokens, pooled text for the toy transformer."""

    def make(channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(INPUTS_SEED)
        x = torch.randn(2, channels, 6, 8, generator=draw)
        return (
            x,
            torch.rand(2, generator=draw),
            torch.randn(2, 5, 48, generator=draw),
            torch.randn(2, 40, generator=draw),
        )

    return make


@pytest.fixture
def theirs() -> Callable[..., torch.Tensor]:
    """``theirs(model, x, t, context, pooled)``: the prediction of a diffusers transformer."""

    def predict(model, x, t, context, pooled) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return model(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t).sample

    return predict
