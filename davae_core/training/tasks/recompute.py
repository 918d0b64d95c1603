"""Activation checkpointing: less memory in the backward pass, for one more forward pass."""

import functools
from collections.abc import Iterable

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(modules: Iterable[nn.Module]) -> None:
    """Keep only the modules' inputs for the backward pass and compute what is inside them again, in place."""
    for module in modules:
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
