"""Activation checkpointing: less memory in the backward pass, for one more forward pass."""

import functools
from collections.abc import Iterable

from torch import nn
from torch.utils.checkpoint import checkpoint

from ...autoencoder import AttnBlock, Downsample, ResnetBlock, Upsample


def recompute(modules: Iterable[nn.Module]) -> None:
    """Keep only the modules' inputs for the backward pass and compute what is inside them again, in place."""
    for module in modules:
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def blocks_of(*parts: nn.Module) -> list[nn.Module]:
    """The blocks in parts of an autoencoder that hold most of what a backward pass through them needs."""
    kinds = (ResnetBlock, AttnBlock, Upsample, Downsample)
    return [module for part in parts for module in part.modules() if isinstance(module, kinds)]
