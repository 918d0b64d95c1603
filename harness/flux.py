"""Random weights in the layout of FLUX.1-dev's checkpoint, one block of each kind, under its workflow's names.

What they draw is noise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from davae_core.adapter import Recommended
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.davae import DAVAE
from davae_core.predictor import DetailPredictor

from .sd35 import clip_state, t5_state
from .untrained import Family

CHECKPOINT, DAVAE_FILE, PREDICTOR = "flux1-dev-fp8.safetensors", "flux_davae.safetensors", "flux_predictor.safetensors"
FILES = [("checkpoints", CHECKPOINT), ("vae", DAVAE_FILE), ("latent_upscale_models", PREDICTOR)]
SHIFT, SCALE = 0.1159, 0.3611  # of FLUX.1's latents

WIDTH = 128  # one head's: the rotary embedding's axes are 16 + 56 + 56
HEADS = """dit_config["num_heads"] = {}
            dit_config["mlp_ratio"] = 4.0
            dit_config["theta"] = 10000"""


def with_one_head(comfyui: Path) -> None:
    """Let a copy of ComfyUI know a FLUX.1 of one head: with 24 it would be gigabytes. Nothing else changes."""
    path = comfyui / "comfy" / "model_detection.py"
    text = path.read_text(encoding="utf-8")
    assert text.count(HEADS.format(24)) == 1, f"{path.name} tells FLUX.1 in another way"
    path.write_text(text.replace(HEADS.format(24), HEADS.format(1)), encoding="utf-8")


def write_files(models: Path) -> None:
    """Put every file that the flux workflow asks for into a ``models`` directory."""
    family = Family(base=AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1))
    davae, predictor = family.davae(), family.predictor()
    latent = replace(family.latent, base_shift=SHIFT, base_scale=SCALE)
    model = DAVAE(replace(davae.config, latent=latent))
    model.load_state_dict(davae.state_dict())
    ours = DetailPredictor(replace(predictor.config, latent=latent))
    ours.load_state_dict(predictor.state_dict())
    for kind, _ in FILES:
        (models / kind).mkdir(parents=True, exist_ok=True)
    save_file({name: t.half().contiguous() for name, t in _checkpoint().items()}, models / "checkpoints" / CHECKPOINT)
    checkpoints.save_autoencoder(models / "vae" / DAVAE_FILE, model.half(), Recommended(size=1024))
    checkpoints.save_predictor(models / "latent_upscale_models" / PREDICTOR, ours)


def _checkpoint() -> dict[str, torch.Tensor]:
    """The diffusion model, both text encoders, and a VAE of the true shape."""
    torch.manual_seed(0)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in diffusion_model().items()}
    state |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in clip_state(768).items()}
    state |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5_state().items()}
    return state | {f"vae.{name}": tensor for name, tensor in Autoencoder(AutoencoderConfig()).state_dict().items()}


def diffusion_model(width: int = WIDTH, context: int = 4096, pooled: int = 768) -> dict[str, torch.Tensor]:
    """FLUX.1-dev with one double and one single block."""
    state = _linear("img_in", 64, width) | _linear("txt_in", context, width)
    for name, inputs in (("time_in", 256), ("guidance_in", 256), ("vector_in", pooled)):
        state |= _linear(f"{name}.in_layer", inputs, width) | _linear(f"{name}.out_layer", width, width)
    for stream in ("img", "txt"):
        prefix = f"double_blocks.0.{stream}_"
        state |= _linear(f"{prefix}mod.lin", width, 6 * width) | _linear(f"{prefix}attn.qkv", width, 3 * width)
        state |= _linear(f"{prefix}attn.proj", width, width) | _norms(f"{prefix}attn.norm")
        state |= _linear(f"{prefix}mlp.0", width, 4 * width) | _linear(f"{prefix}mlp.2", 4 * width, width)
    state |= _linear("single_blocks.0.linear1", width, 7 * width) | _linear("single_blocks.0.linear2", 5 * width, width)
    state |= _linear("single_blocks.0.modulation.lin", width, 3 * width) | _norms("single_blocks.0.norm")
    return (
        state | _linear("final_layer.linear", width, 64) | _linear("final_layer.adaLN_modulation.1", width, 2 * width)
    )


def _linear(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(outputs, inputs) * 0.02, f"{name}.bias": torch.zeros(outputs)}


def _norms(name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}_norm.scale": torch.ones(WIDTH) for part in ("query", "key")}
