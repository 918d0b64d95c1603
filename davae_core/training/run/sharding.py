"""FSDP: each process keeps a part of every weight, and a block is whole only while it computes.

Asked for by the configuration of ``accelerate launch`` (``distributed_type: FSDP``); done with ``fully_shard`` of
PyTorch, which cuts each parameter by itself. So frozen and trained ones may share a block, and only the trained have
gradients and moments. Gradients are averaged over processes as DDP does: the same losses, to rounding.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...errors import DAVAEError
from .task import Phase


def asked(accelerator: Accelerator) -> bool:
    """Whether this run is to be sharded: by the launcher's word, and with more processes than one."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(phase: Phase, accelerator: Accelerator) -> None:
    """Cut the parameters of a phase's shards among the processes, in place; they are DTensors afterwards.

    Raises:
        DAVAEError: the phase has none to cut.
    """
    modules = phase.shards()
    if not modules:
        raise DAVAEError(
            f"{type(phase).__name__} cannot be trained with FSDP: every process keeps its whole model, which is small. "
            "Launch it with a DDP configuration (davae_core/training/configs/ddp_*.yaml)"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in modules:
        fully_shard(module, mesh=mesh)


def sum_gradients(phase: Phase, now: bool) -> None:
    """Whether the next backward pass adds the gradients of all processes, or leaves that to a later one."""
    for module in _sharded([phase]):
        module.set_requires_gradient_sync(now, recurse=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in one piece; where it is cut up, all processes must ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``tensor``, the same on every process, on the device of ``like`` and cut as it is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def gathered(phases: Iterable[Phase]) -> Iterator[None]:
    """Inside, every process has all parameters whole, as plain tensors, and needs the others no more."""
    modules = list(_sharded(phases))
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def _sharded(phases: Iterable[nn.Module]) -> Iterator[FSDPModule]:
    """All modules that :func:`shard` cut."""
    return (module for phase in phases for module in phase.modules() if isinstance(module, FSDPModule))
