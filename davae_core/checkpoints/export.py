"""Write our files as folders that diffusers' own classes load.

    model or base model   transformer/   SD3Transformer2DModel
    plain VAE             vae/           AutoencoderKL
    autoencoder           base_vae/      AutoencoderKL: the base VAE as it was
                          detail_vae/    AutoencoderKL: the detail trunk, and the joint decoder without its first layer;
                                         its encoder.conv_out, decoder.conv_in and *quant_conv are those of the base
                                         VAE, not used
                          davae_blocks.safetensors   dc_down.*, dc_up.*: what lies between those two and the latent;
                                         predictor.* of a DA-VAE with a predictor inside
    adapter               pytorch_lora_weights.safetensors   for SD3Transformer2DModel.load_lora_adapter
                          davae_embedder_head.safetensors    P', O' and the changes of P and O
    few-step LoRA         pytorch_lora_weights.safetensors   for the same, on a merged model
    all                   davae.json     the latent: channels, scale, normalisation, recommended sampling; what is told
                                         of the file: title, author, licence, history

Channels are [base, detail] here as everywhere but in the authors' files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter, Recommended
from ..autoencoder import AutoencoderConfig, DecoderTrunk
from ..davae import DAVAE, PREDICTOR
from ..errors import CheckpointError
from ..few_steps import FewStepLora
from ..latent import LatentSpec
from ..lora import lora_deltas
from ..mmdit import MMDiTConfig
from . import files, lora, metadata, reference, tensors, verify
from .diffusers_names import transformer_json, transformer_rules, vae_json, vae_rules
from .names import from_native
from .opening import Part
from .tensors import Tensors, in_memory

WEIGHTS = "diffusion_pytorch_model.safetensors"
LATENT = "davae.json"
PARTS = {"diffusion_model": "transformer", "vae": "vae"}  # what an opened file or folder may hold: folder it goes to
NOTHING = metadata.About()
Units = tuple[float | tuple[float, ...], float | tuple[float, ...]]


def transformer(folder: Path, native: Tensors, file: str, about: metadata.About = NOTHING) -> float:
    """Write a diffusion model as ``SD3Transformer2DModel``; how far the two predict from one another."""
    config = MMDiTConfig.from_state_dict(native.meta)
    theirs = from_native(native, transformer_rules(config))
    difference = verify.mmdit(native, theirs, file)
    _component(folder / PARTS["diffusion_model"], theirs, transformer_json(config), about)
    return difference


def as_diffusers(part: Part) -> Tensors:
    """The tensors of a plain VAE in diffusers' names, however they are stored."""
    if part.theirs is not None:
        return part.theirs
    return from_native(part.native, vae_rules(AutoencoderConfig.from_state_dict(part.native.meta)))


def vae(folder: Path, native: Tensors, file: str, units: Units | None = None, about: metadata.About = NOTHING) -> float:
    """Write a plain VAE as ``AutoencoderKL``; how far the two are from one another.

    ``units`` are its latents' shift and scale; by the shapes where not given.
    """
    config = AutoencoderConfig.from_state_dict(native.meta)
    theirs = from_native(native, vae_rules(config))
    difference = verify.autoencoder(native, theirs, file)
    _component(folder, theirs, vae_json(config, units), about)
    return difference


def base_encoder(model: DAVAE) -> dict[str, torch.Tensor]:
    """What makes a DA-VAE's base latents, in the names of a plain VAE."""
    return _below(model.state_dict(), {"base_encoder.": "encoder.", "base_quant_conv.": "quant_conv."})


def _below(state: Mapping[str, torch.Tensor], prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors whose names start with one of the prefixes, with another in its place: new by old."""
    return {
        f"{new}{name.removeprefix(old)}": tensor
        for old, new in prefixes.items()
        for name, tensor in state.items()
        if name.startswith(old)
    }


@torch.no_grad()
def autoencoder(folder: Path, model: DAVAE, file: str, base: Tensors | None = None) -> float:
    """Write a DA-VAE; how far images and latents are from the model's.

    Args:
        folder: an empty folder.
        model: what to write.
        file: its name, for messages.
        base: the base VAE, native names, for a model that holds no base decoder.

    Raises:
        CheckpointError: no base decoder is at hand, or the results differ.
    """
    state, encoder = model.state_dict(), base_encoder(model)
    decoder = _below(state, {"base_decoder.": "decoder.", "base_post_quant_conv.": "post_quant_conv."})
    if not decoder and base is not None:
        decoder = {name: base[name] for name in base if name.startswith(("decoder.", "post_quant_conv."))}
    if not decoder:
        raise CheckpointError(f"{file} holds no base decoder, which AutoencoderKL has; name the base VAE with --base")
    units = (model.latent.base_shift, model.latent.base_scale)
    difference = vae(folder / "base_vae", in_memory(encoder | decoder), file, units)
    detail = encoder | decoder | _below(state, {"detail_trunk.": "encoder.", "decoder.": "decoder."})
    theirs = from_native(in_memory(detail), vae_rules(model.config.base))
    with torch.device("meta"):
        trunk = DecoderTrunk(model.config.base)
    trunk.load_state_dict(
        {name: tensor.float() for name, tensor in _below(state, {"decoder.": ""}).items()}, assign=True
    )
    h = torch.randn(1, model.config.base.feature_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    shown = reference.decode_features(theirs, h)
    difference = max(difference, verify.same(f"the image of {file}", trunk.trunk(h), shown))
    _component(folder / "detail_vae", theirs, vae_json(model.config.base, units))
    blocks = _below(state, {"detail_down.": "dc_down.", "joint_up.": "dc_up.", PREDICTOR: PREDICTOR})
    files.save(folder / "davae_blocks.safetensors", blocks, {})
    return difference


def adapter(folder: Path, given: Adapter, file: str) -> float:
    """Write an adapter; how far the LoRA's products are from the adapter's."""
    loras = lora.for_diffusers(given.lora_state())
    difference = 0.0
    if loras:
        plain = Adapter(given.config, loras)
        for (name, _, ours), (_, _, theirs) in zip(lora_deltas(given.state), lora_deltas(plain.state), strict=True):
            difference = max(difference, _relative(ours, theirs))
            if difference > 1e-2:  # a factor that is rounded to the file's dtype
                raise CheckpointError(f"{file}: the LoRA of {name} is not the same without its alpha")
        files.save(folder / lora.WEIGHTS[0], loras, {"format": "pt"})
    rest = {name: tensor for name, tensor in given.state.items() if name not in given.lora_state()}
    files.save(folder / "davae_embedder_head.safetensors", rest, {"format": "pt"})
    return difference


def few_step_lora(folder: Path, given: FewStepLora) -> None:
    """Write a few-step LoRA; diffusers puts it on a merged model."""
    files.save(folder / lora.WEIGHTS[0], lora.for_diffusers(given.state), {"format": "pt"})


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))


def latent(folder: Path, spec: LatentSpec, recommended: Recommended, about: metadata.About = NOTHING) -> None:
    """Write what diffusers has no place for."""
    _json(folder / LATENT, metadata.latent_config(spec, recommended) | about.json())


def _component(folder: Path, theirs: Tensors, config: Mapping[str, Any], about: metadata.About = NOTHING) -> None:
    tensors.write(folder / WEIGHTS, theirs, {"format": "pt", **about.metadata()})
    _json(folder / "config.json", config)


def _json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
