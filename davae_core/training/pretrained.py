"""The diffusion model a training starts from, out of the files people have."""

from pathlib import Path

import torch

from ..checkpoints.opening import open_any
from ..errors import CheckpointError

KINDS = ("sd3 model", "sd3 checkpoint", "diffusers transformer")


def diffusion_model(path: Path) -> dict[str, torch.Tensor]:
    """An SD3 / SD3.5 diffusion model in the names of its own layout, in the file's dtype.

    Of a checkpoint only this part is read: its text encoders stay on the disk.

    Args:
        path: a diffusion model's file, a checkpoint that holds one, or a folder of diffusers' layout.

    Raises:
        CheckpointError: it cannot be read, or holds no unadapted SD3 / SD3.5 model.
    """
    opened = open_any(path)
    if opened.detected.kind not in KINDS or "diffusion_model" not in opened.parts:
        raise CheckpointError(
            f"{path.name} is {opened.detected.description}; give an unadapted SD3 / SD3.5 diffusion model, a "
            "checkpoint that holds one, or a folder of diffusers' layout (--model)"
        )
    return dict(opened.parts["diffusion_model"].native)
