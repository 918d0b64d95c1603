"""Whether the tensors of a file are exactly those of a model: by names, shapes and dtypes, before any is read."""

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import CheckpointError
from ..mmdit import MMDiT, MMDiTConfig

State = Mapping[str, torch.Tensor]


def check(meta: State, model: nn.Module, file: str, extra: bool = False) -> None:
    """Raise CheckpointError unless the names and shapes are the model's and all are floating-point numbers.

    Args:
        meta: the file's tensors; their values are not looked at.
        model: what they are for, on the meta device.
        file: its name, for messages.
        extra: whether there may be other tensors beside.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in meta]
    if missing:
        first = f"{missing[0]} first" if len(missing) > 1 else missing[0]
        raise CheckpointError(
            f"{file} lacks {len(missing)} tensor{'s' * (len(missing) > 1)} of its model, {first}; it is damaged or of "
            "another model"
        )
    for name, shape in wanted.items():
        if tuple(meta[name].shape) != shape:
            raise CheckpointError(
                f"{file}: the tensor {name} has shape {list(meta[name].shape)}, expected {list(shape)}; it is damaged "
                "or of another model"
            )
    others = [name for name in meta if name not in wanted]
    if others and not extra:
        raise CheckpointError(
            f"{file} holds {len(others)} tensors that its model does not have, {others[0]} first; it is another model, "
            "or quantised"
        )
    check_floats({name: meta[name] for name in wanted}, file)


def diffusion_model(meta: State, file: str) -> MMDiTConfig:
    """The configuration of an SD3 / SD3.5 diffusion model that is whole: every tensor there, in its shape, none beside.

    Raises:
        DAVAEError: it is not.
    """
    config = MMDiTConfig.from_state_dict(meta)
    with torch.device("meta"):
        model = MMDiT(config)
    check(meta, model, file)
    return config


def check_floats(meta: State, file: str) -> None:
    """Raise CheckpointError for weights that are whole numbers: quantised, or of something else."""
    for name, tensor in meta.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{file}: the tensor {name} holds {str(tensor.dtype).removeprefix('torch.')}, expected floating-point "
                "numbers; use a file that is not quantised"
            )
