"""The names of diffusers' ``SD3Transformer2DModel`` and ``AutoencoderKL``, and the ``config.json`` beside them.

Source: the state dicts of those two classes (diffusers 0.35 to 0.42).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..autoencoder import MOST_BLOCKS as MOST_VAE_BLOCKS
from ..autoencoder import MOST_LEVELS, NORM_GROUPS, Autoencoder, AutoencoderConfig
from ..bases import normalisation_by_shape
from ..errors import CheckpointError, DAVAEError
from ..mmdit import HEAD_DIM, MOST_BLOCKS, MMDiT, MMDiTConfig
from ..shapes import dims, number_at, numbered
from .names import Rule
from .tensors import Tensors

_MODEL = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCK: dict[str, tuple[str, ...]] = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}


def transformer_config(theirs: Mapping[str, torch.Tensor]) -> MMDiTConfig:
    """The configuration of an ``SD3Transformer2DModel``, off its shapes.

    Raises:
        CheckpointError: the names are not those of that class.
    """
    try:
        blocks = {number_at(name, 1) for name in theirs if name.startswith("transformer_blocks.")}
        depth = numbered(blocks, "transformer blocks", MOST_BLOCKS)
        hidden, channels, patch, _ = dims(theirs, "pos_embed.proj.weight", 4)
        return MMDiTConfig(
            hidden=hidden,
            depth=depth,
            in_channels=channels,
            out_channels=dims(theirs, "proj_out.weight", 2)[0] // patch**2,
            patch=patch,
            grid=math.isqrt(dims(theirs, "pos_embed.pos_embed", 3)[1]),
            context=dims(theirs, "context_embedder.weight", 2)[1],
            pooled=dims(theirs, "time_text_embed.text_embedder.linear_1.weight", 2)[1],
            dual_attention=tuple(i for i in range(depth) if f"transformer_blocks.{i}.attn2.to_q.weight" in theirs),
            qk_norm="transformer_blocks.0.attn.norm_q.weight" in theirs,
        )
    except DAVAEError as problem:
        raise CheckpointError(f"not diffusers' SD3 transformer: {problem}") from problem


def transformer_rules(config: MMDiTConfig) -> list[Rule]:
    """A rule for every tensor of the MMDiT.

    diffusers puts scale before shift in the last layer and in the last block's text stream; SD3's files shift first.
    """
    with torch.device("meta"):
        names = list(MMDiT(config).state_dict())
    return [_transformer_rule(name, config.depth - 1) for name in names]


def _transformer_rule(name: str, last: int) -> Rule:
    if name == "pos_embed":
        return Rule(name, ("pos_embed.pos_embed",))
    module, _, part = name.rpartition(".")
    swapped = module in ("final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1")
    if module in _MODEL:
        return Rule(name, (f"{_MODEL[module]}.{part}",), swapped)
    _, block, inner = module.split(".", 2)
    return Rule(name, tuple(f"transformer_blocks.{block}.{theirs}.{part}" for theirs in _BLOCK[inner]), swapped)


def transformer_json(config: MMDiTConfig) -> dict[str, Any]:
    """What ``SD3Transformer2DModel.from_pretrained`` reads."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": HEAD_DIM,
        "caption_projection_dim": config.hidden,
        "dual_attention_layers": list(config.dual_attention),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context,
        "num_attention_heads": config.heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch,
        "pooled_projection_dim": config.pooled,
        "pos_embed_max_size": config.grid,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": 128,
    }


def vae_config(theirs: Mapping[str, torch.Tensor]) -> AutoencoderConfig:
    """The configuration of an ``AutoencoderKL``, off its shapes.

    Raises:
        CheckpointError: the names are not those of that class.
    """
    try:
        found = _numbers(theirs, r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
        levels = numbered(found, "resolution levels", MOST_LEVELS)
        blocks = _numbers(theirs, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight")
        return AutoencoderConfig(
            widths=tuple(dims(theirs, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)),
            blocks=numbered(blocks, "blocks of a level", MOST_VAE_BLOCKS),
            latent_channels=dims(theirs, "encoder.conv_out.weight", 4)[0] // 2,
            image_channels=dims(theirs, "encoder.conv_in.weight", 4)[1],
            quant_conv="quant_conv.weight" in theirs,
        )
    except DAVAEError as problem:
        raise CheckpointError(f"not diffusers' AutoencoderKL: {problem}") from problem


# What earlier versions of diffusers called the layers of a VAE's attention. Source: diffusers'
# ModelMixin._convert_deprecated_attention_blocks, which still reads them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(
    r"((?:en|de)coder\.mid_block\.attentions\.0)\.(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)"
)


def current_vae(stored: Tensors) -> Tensors:
    """An ``AutoencoderKL`` in the names that diffusers writes now, the attention's layers linear.

    Files of before call them otherwise, and some hold them as 1x1 convolutions, as the LDM layout does.
    """
    names = {}
    for name in stored:
        match = _ATTENTION.fullmatch(name)
        new = f"{match[1]}.{_OLD_ATTENTION.get(match[2], match[2])}.{match[3]}" if match else name
        names[name if new in stored else new] = name
    renamed = stored.renamed(names)
    meta = {name: _linear(name, tensor) for name, tensor in renamed.meta.items()}
    return Tensors(meta, lambda name: _linear(name, renamed[name]))


def _linear(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if _ATTENTION.fullmatch(name) and tensor.shape[2:] == (1, 1) else tensor


def _numbers(theirs: Iterable[str], pattern: str) -> set[int]:
    return {int(match.group(1)[:9]) for name in theirs if (match := re.fullmatch(pattern, name, re.ASCII))}


def vae_rules(config: AutoencoderConfig) -> list[Rule]:
    """A rule for every tensor of the autoencoder, names as in the SD3 VAE file."""
    with torch.device("meta"):
        names = list(Autoencoder(config).state_dict())
    return [_vae_rule(name, len(config.widths)) for name in names]


_VAE = (
    (r"^(en|de)coder\.norm_out\.", r"\1coder.conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
)


def _vae_rule(name: str, levels: int) -> Rule:
    theirs = name
    for pattern, replacement in _VAE:
        theirs = re.sub(pattern, replacement, theirs)
    # The file numbers the decoder's levels by resolution, diffusers by the order in which they run.
    theirs = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", theirs)
    linear = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
    return Rule(name, (theirs,), linear=linear)


def vae_json(config: AutoencoderConfig, units: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """What ``AutoencoderKL.from_pretrained`` reads; ``units`` are (shift, scale), by the shapes where not given."""
    shift, scale = units or normalisation_by_shape(config)
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks,
        "norm_num_groups": NORM_GROUPS,
        "out_channels": config.image_channels,
        "sample_size": 1024,
        "scaling_factor": scale,
        "shift_factor": shift,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.quant_conv,
        "use_quant_conv": config.quant_conv,
    }
