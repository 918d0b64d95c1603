"""Operations and bytes of a call, counted from its shapes: nothing is computed and no memory is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.mmdit import MMDiT, MMDiTConfig

from .setup import TEXT_TOKENS


@dataclass(frozen=True)
class Cost:
    """What a call takes at least.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; a multiply-add counts as two.
        bytes: what all operations read and write when none is fused with another; weights are part of it.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = [result.alias_info for result in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returns):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of attention on a CPU, which torch's counter leaves out."""
    return sdpa_flop_count(query, key, value)


_MAPPING = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def count(make: Callable[[], Callable[[], object]], dtype: torch.dtype) -> Cost:
    """The cost of a call.

    Args:
        make: builds models and inputs, on the CPU, and returns the call; it is run with tensors that have a shape only.
        dtype: of whatever it builds without naming one.
    """
    with torch.no_grad(), _default(dtype), FakeTensorMode():
        call = make()
        traffic = _Traffic()
        with traffic, FlopCounterMode(display=False, custom_mapping=_MAPPING) as flops:
            call()
    return Cost(float(flops.get_total_flops()), float(traffic.bytes))


def model_call(config: MMDiTConfig, height: int, width: int, batch: int, dtype: torch.dtype) -> Cost:
    """One call of a diffusion model with a latent ``[batch, C, height, width]``."""

    def make() -> Callable[[], object]:
        model = MMDiT(config)
        x = torch.empty(batch, config.in_channels, height, width)
        context = torch.empty(batch, TEXT_TOKENS, config.context)
        pooled = torch.empty(batch, config.pooled)
        return lambda: model(x, torch.empty(batch, dtype=torch.float32), context, pooled)

    return count(make, dtype)


def autoencoder(what: str, davae: bool, size: int, batch: int, dtype: torch.dtype) -> Cost:
    """Encoding or decoding ("encode", "decode") pictures of ``size`` x ``size`` px with a DA-VAE or the SD3 VAE."""

    def make() -> Callable[[], object]:
        model = DAVAE(DAVAEConfig()) if davae else Autoencoder(AutoencoderConfig())
        shape = (batch, 3, size, size)
        if what == "decode":
            channels, factor = (32, 16) if davae else (16, 8)
            shape = (batch, channels, size // factor, size // factor)
        given = torch.empty(shape)
        return lambda: getattr(model, what)(given)

    return count(make, dtype)
