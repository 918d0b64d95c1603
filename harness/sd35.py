"""Random weights in the layout of SD3.5-medium's files, few blocks deep, under the names that the workflows ask for.

What they draw is noise. They prove that the workflows load and run through the real loaders, at the real widths of the
text encoders and the VAE.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from davae_core.adapter import Recommended
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.mmdit import MMDiTConfig

from .locate import ComfyUI
from .untrained import Family

CHECKPOINT = "sd3.5_medium.safetensors"
CLIP_L, CLIP_G, T5 = "clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"
DAVAE, PREDICTOR = "sd35_davae.safetensors", "sd35_predictor.safetensors"
ADAPTERS = {f"sd35m_davae_{size}.safetensors": size for size in (1024, 2048)}
FEW_STEPS = "sd35m_davae_fast.safetensors"

# All of them, with their folders.
FILES = [("checkpoints", CHECKPOINT), *(("text_encoders", name) for name in (CLIP_L, CLIP_G, T5))]
FILES += [("vae", DAVAE), ("latent_upscale_models", PREDICTOR), *(("loras", name) for name in (*ADAPTERS, FEW_STEPS))]

# Of ComfyUI's own configurations, what makes the text encoders small; widths stay as they are.
SHORT = {
    "sd1_clip_config.json": {"num_hidden_layers": 3, "intermediate_size": 64},
    "clip_config_bigg.json": {"num_hidden_layers": 3, "intermediate_size": 64},
    "text_encoders/t5_config_xxl.json": {"num_layers": 1, "num_heads": 1, "d_ff": 64},
}
CLIPS = {CLIP_L: 768, CLIP_G: 1280}  # their widths
# By this tensor ComfyUI tells a CLIP-G; in the short one it belongs to no layer.
MARK = "text_model.encoder.layers.30.mlp.fc1.weight"
USERS_OWN = ("models", "input", "output", "temp", "user", "custom_nodes", ".git")


def with_short_text_encoders(comfyui: ComfyUI, into: Path) -> ComfyUI:
    """A copy of a ComfyUI whose CLIP-L, CLIP-G and T5-XXL have one or three narrow layers; nothing else is changed."""
    users_own = {str(comfyui.root / name) for name in USERS_OWN}
    shutil.copytree(
        comfyui.root, into, ignore=lambda folder, names: [n for n in names if os.path.join(folder, n) in users_own]
    )
    for name, changes in SHORT.items():
        path = into / "comfy" / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return replace(comfyui, root=into)


def write_files(models: Path) -> None:
    """Put every file that the sd35 workflows ask for into a ``models`` directory."""
    family = Family(
        base=AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1),
        model=MMDiTConfig(hidden=128, depth=2, dual_attention=(0,)),
    )
    _save(models / "checkpoints" / CHECKPOINT, _checkpoint(family))
    for name, width in CLIPS.items():
        mark = {MARK: torch.zeros(1)} if name == CLIP_G else {}
        _save(models / "text_encoders" / name, clip_state(width) | mark)
    _save(models / "text_encoders" / T5, t5_state())
    checkpoints.save_autoencoder(models / "vae" / DAVAE, family.davae().half(), Recommended(size=1024))
    (models / "latent_upscale_models").mkdir(parents=True, exist_ok=True)
    checkpoints.save_predictor(models / "latent_upscale_models" / PREDICTOR, family.predictor())
    for name, size in ADAPTERS.items():
        told = Recommended(size=size, shift=4.0 if size == 2048 else 3.0, cfg=2.5, steps=30)
        checkpoints.save_adapter(models / "loras" / name, replace(family, recommended=told).adapter())
    few = replace(family.few_steps(), recommended=Recommended(size=2048, shift=4.0, cfg=1.0, steps=4))
    checkpoints.save_few_step_lora(models / "loras" / FEW_STEPS, few)


def _checkpoint(family: Family) -> dict[str, torch.Tensor]:
    """The diffusion model, and a VAE of the true shape."""
    model = {f"model.diffusion_model.{name}": t for name, t in family.diffusion_model().state_dict().items()}
    vae = {f"first_stage_model.{name}": t for name, t in Autoencoder(AutoencoderConfig()).state_dict().items()}
    return model | vae


def clip_state(width: int, words: int = 49408) -> dict[str, torch.Tensor]:
    """A CLIP text model of three layers, in the names of transformers."""
    top = "text_model."
    state = {
        f"{top}embeddings.token_embedding.weight": _random(words, width),
        f"{top}embeddings.position_embedding.weight": _random(77, width),
        "text_projection.weight": _random(width, width),
        **_layer_norm(f"{top}final_layer_norm", width),
    }
    for layer in range(3):
        prefix = f"{top}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= _linear(f"{prefix}self_attn.{part}", width, width)
        state |= _linear(f"{prefix}mlp.fc1", width, 64) | _linear(f"{prefix}mlp.fc2", 64, width)
        state |= _layer_norm(f"{prefix}layer_norm1", width) | _layer_norm(f"{prefix}layer_norm2", width)
    return state


def t5_state(width: int = 4096, inner: int = 64, words: int = 32128) -> dict[str, torch.Tensor]:
    """A T5 encoder of one layer with one head."""
    attention, gated = "encoder.block.0.layer.0.", "encoder.block.0.layer.1."
    return {
        "shared.weight": _random(words, width),
        **{f"{attention}SelfAttention.{part}.weight": _random(inner, width) for part in "qkv"},
        f"{attention}SelfAttention.o.weight": _random(width, inner),
        f"{attention}SelfAttention.relative_attention_bias.weight": _random(32, 1),
        f"{attention}layer_norm.weight": torch.ones(width),
        f"{gated}DenseReluDense.wi_0.weight": _random(inner, width),
        f"{gated}DenseReluDense.wi_1.weight": _random(inner, width),
        f"{gated}DenseReluDense.wo.weight": _random(width, inner),
        f"{gated}layer_norm.weight": torch.ones(width),
        "encoder.final_layer_norm.weight": torch.ones(width),
    }


def _linear(name: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": _random(outputs, inputs), f"{name}.bias": torch.zeros(outputs)}


def _layer_norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float32).mul_(0.02)


def _save(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, path)
