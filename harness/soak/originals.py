"""A small good file or folder of every kind that is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from davae_core.adapter import Adapter
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import convert, export, files, tensors
from davae_core.checkpoints.authors_autoencoder import STATISTICS
from davae_core.checkpoints.diffusers_names import transformer_rules
from davae_core.checkpoints.names import from_native
from davae_core.few_steps import FewStepLora
from davae_core.history import History, identity
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.predictor import DetailPredictor, PredictorConfig
from davae_core.tiny_decoder import TinyDecoder, TinyDecoderConfig

from ..untrained import Family

FAMILY = Family(
    base=AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1),
    model=MMDiTConfig(hidden=64, depth=2, grid=8, context=16, pooled=16, dual_attention=(0,)),
)
STEM = "transformer.transformer_blocks.0.attn.to_q"


def make(folder: Path) -> None:
    """Write them all."""
    model, davae, adapter = FAMILY.diffusion_model(), FAMILY.davae().half(), FAMILY.adapter()
    told = History(
        steps=10,
        learning_rate=1e-4,
        seed=1,
        recipe="toy",
        settings={"data.size": 64},
        of={"base_model": identity("base_model", model.state_dict(), "base.safetensors")},
    )
    checkpoints.save_autoencoder(folder / "autoencoder.safetensors", davae, FAMILY.recommended, history=told)
    checkpoints.save_adapter(folder / "adapter.safetensors", adapter, history=told)
    checkpoints.save_merged(folder / "merged.safetensors", replace(FAMILY.merged(), history=told))
    checkpoints.save_text_encoder(folder / "text_encoder.safetensors", FAMILY.text_encoder())
    predictor = DetailPredictor(PredictorConfig(FAMILY.latent, width=64, blocks=2)).half()
    checkpoints.save_predictor(folder / "predictor.safetensors", predictor, history=told)
    residual = FAMILY.davae()
    residual.set_predictor(DetailPredictor(PredictorConfig(FAMILY.latent, width=64, blocks=2)))
    checkpoints.save_autoencoder(folder / "residual.safetensors", residual.half(), FAMILY.recommended, history=told)
    few = FewStepLora(FAMILY.latent, replace(FAMILY.recommended, cfg=1.0, steps=4), adapter.lora_state(), told)
    checkpoints.save_few_step_lora(folder / "few_steps.safetensors", few)
    decoder = TinyDecoder(TinyDecoderConfig(FAMILY.latent, (16, 8, 8, 8, 8))).half()
    checkpoints.save_tiny_decoder(folder / "tiny_decoder.safetensors", decoder, history=told)
    files.save(folder / "base.safetensors", model.state_dict(), {"modelspec.title": "base"})
    vae = Autoencoder(FAMILY.base).half()
    files.save(folder / "vae.safetensors", vae.state_dict(), {"davae.base": "sd3"})
    whole = {f"model.diffusion_model.{name}": tensor.half() for name, tensor in model.state_dict().items()}
    whole |= {f"first_stage_model.{name}": tensor for name, tensor in vae.state_dict().items()}
    files.save(folder / "whole.safetensors", whole, {})
    convert.main([str(folder / "whole.safetensors"), str(folder / "pipeline"), "--to", "diffusers"])
    convert.main([str(folder / "merged.safetensors"), str(folder / "merged_pipeline"), "--to", "diffusers"])
    _shards(folder / "shards", model)
    _lora(folder / "lora", adapter)
    _authors_autoencoder(folder / "authors_autoencoder", vae)
    _authors_adapter(folder / "authors_adapter", model, adapter)


def _shards(folder: Path, model: MMDiT) -> None:
    folder.mkdir()
    native = tensors.in_memory(model.state_dict())
    theirs = from_native(native, transformer_rules(FAMILY.model))
    names = sorted(theirs)
    home = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1}-of-2.safetensors"
        save_file({name: theirs[name].contiguous() for name in part}, folder / file)
        home |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": native.bytes}, "weight_map": home}
    (folder / f"{export.WEIGHTS}.index.json").write_text(json.dumps(index))


def _lora(folder: Path, adapter: Adapter) -> None:
    folder.mkdir()
    lora = {name: tensor for name, tensor in adapter.lora_state().items() if not name.endswith(".alpha")}
    save_file(lora, folder / "adapter_model.safetensors")
    config = {"lora_alpha": 4, "r": 4, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 8}, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _authors_autoencoder(folder: Path, vae: Autoencoder) -> None:
    folder.mkdir()
    theirs = export.as_diffusers(_part(vae))
    width = FAMILY.base.feature_channels
    state = {f"vae.{name}": theirs[name].float() for name in theirs}
    state |= {f"original_vae_model.vae.{name}": theirs[name].float() for name in theirs}
    for name, out, channels in (("dc_down", 8, width), ("dc_up", 4 * width, 32)):
        state[f"{name}.conv.weight"] = torch.randn(out, channels, 3, 3) * 0.05
        state[f"{name}.conv.bias"] = torch.randn(out) * 0.1
    torch.save(state, folder / "pytorch_model.bin")
    _statistics(folder)


def _part(vae: Autoencoder) -> convert.Part:
    return convert.Part(tensors.in_memory(vae.state_dict()), None, "vae")


def _authors_adapter(folder: Path, model: MMDiT, adapter: Adapter) -> None:
    folder.mkdir()
    state = model.state_dict()
    hidden, channels, patch = FAMILY.model.hidden, 16, 2
    branches = {
        "tokenizer_patch_embed.proj.base_conv.weight": state["x_embedder.proj.weight"],
        "tokenizer_patch_embed.proj.base_conv.bias": state["x_embedder.proj.bias"],
        "tokenizer_patch_embed.proj.extra_conv.weight": torch.randn(hidden, channels, patch, patch) * 0.1,
        "tokenizer_patch_embed.proj.extra_conv.bias": torch.zeros(hidden),
        "project_out.base_linear.weight": state["final_layer.linear.weight"],
        "project_out.base_linear.bias": state["final_layer.linear.bias"],
        "project_out.extra_linear.weight": torch.randn(patch**2 * channels, hidden) * 0.1,
        "project_out.extra_linear.bias": torch.zeros(patch**2 * channels),
    }
    torch.save({"model_state_dict": branches, "global_step": 5}, folder / "latest.pt")
    _statistics(folder)
    _lora(folder / "lora_weights", adapter)


def _statistics(folder: Path) -> None:
    (folder / STATISTICS).write_text(json.dumps({"mean": [0.1] * 16, "std": [1.0] * 16}))
