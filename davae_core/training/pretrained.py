"""The base models a training starts from, out of the files people have: alone, or as a part of a whole checkpoint.

Only the tensors of the part that is asked for are read: the text encoders of a checkpoint stay on the disk.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from ..checkpoints import files
from ..checkpoints.detect import CHECKPOINT_PREFIXES, detect
from ..errors import CheckpointError

Tensors = dict[str, torch.Tensor]


def diffusion_model(path: Path) -> Tensors:
    """An SD3 / SD3.5 diffusion model in the names of its own layout, in the file's dtype.

    Args:
        path: a diffusion model's file, or a checkpoint that holds one under ``model.diffusion_model.``.

    Raises:
        CheckpointError: the file cannot be read, or holds no unadapted SD3 / SD3.5 model.
    """
    shapes, info = files.read_metadata(path)
    found = detect(shapes, info.get("davae.kind"))
    if found.kind not in ("sd3 model", "sd3 checkpoint"):
        raise CheckpointError(
            f"{Path(path).name} is {found.description}; give an unadapted SD3 / SD3.5 diffusion model, or a checkpoint "
            "that holds one (--model)"
        )
    return _part(path, shapes, ("", *CHECKPOINT_PREFIXES), "joint_blocks.0.x_block.attn.qkv.weight")


def autoencoder(path: Path) -> Tensors:
    """A KL autoencoder in the SD3 VAE's names, in the file's dtype.

    Args:
        path: a VAE's file, or a checkpoint that holds one under ``first_stage_model.``.

    Raises:
        CheckpointError: the file cannot be read, or holds no such autoencoder.
    """
    shapes, info = files.read_metadata(path)
    try:
        return _part(path, shapes, ("", "first_stage_model."), "encoder.conv_in.weight")
    except StopIteration:
        found = detect(shapes, info.get("davae.kind"))
        raise CheckpointError(
            f"{Path(path).name} is {found.description}; give a VAE, or a checkpoint that holds one"
        ) from None


def _part(path: Path, shapes: dict[str, tuple[int, ...]], prefixes: Sequence[str], name: str) -> Tensors:
    """The tensors that share the prefix of ``name``, without it; StopIteration where no prefix has it."""
    prefix = next(p for p in prefixes if p + name in shapes)
    with safe_open(path, framework="pt", device="cpu") as file:
        return {key.removeprefix(prefix): file.get_tensor(key) for key in shapes if key.startswith(prefix)}
