"""In which numbers the forward and backward pass compute: decided once for a run, and kept."""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import DAVAEError
from .config import Precision

logger = logging.getLogger(__name__)


def settled(asked: Precision, device: torch.device, before: str | None = None) -> Precision:
    """``fp32`` or ``bf16`` for the whole run; says which, and why.

    Args:
        asked: what the settings say.
        device: what computes.
        before: what a run that goes on computed in so far; None for a new run.

    Raises:
        DAVAEError: the run went in bf16 so far by "auto", and this device cannot, or has to emulate it.
    """
    fast = computes_bf16(device)
    if asked != "auto":
        chosen, why = asked, "as the settings say"
    elif before in ("fp32", "bf16"):
        chosen, why = before, "as the run did so far"  # type: ignore[assignment]
        if chosen == "bf16" and not fast:
            raise DAVAEError(
                f"this run computed in bf16 so far, and {name(device)} is not made for that. Go on in fp32 "
                "(--run.precision fp32 --run.change run.precision), or on a device that computes in bf16; "
                "--run.precision bf16 emulates it, some thirty times slower"
            )
    else:
        chosen, why = (
            ("bf16", f"{name(device)} computes in it") if fast else ("fp32", f"{name(device)} has no fast bf16")
        )
    logger.info("precision: %s, %s", chosen, why)
    return chosen


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The precision of the forward pass; "auto" is what the device is fast in."""
    bf16 = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def attention(precision: str, device: torch.device) -> AbstractContextManager:
    """What attention a forward pass and its backward pass compute. On a CPU in bf16: products of matrices, since the
    backward pass of PyTorch's fused kernel takes three times as long (64 x 4 heads, 24 to 72 tokens)."""
    plain = device.type == "cpu" and not isinstance(autocast(precision, device), nullcontext)
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def computes_bf16(device: torch.device) -> bool:
    """Whether the device is faster in bf16 than in fp32.

    CPUs surely are with AMX. AVX512_BF16 reached 0.55 of fp32's speed on one CPU and 1.8 on another (Zen 5), so it is
    left to the person to ask for it; emulation reached 0.03.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def name(device: torch.device) -> str:
    """The device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"
