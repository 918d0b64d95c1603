"""Attention that never holds the scores of all pairs of a large picture."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

ATTENTION_SCORES = 2**24  # held at a time where the attention has no fused kernel: 64 MiB in float32


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T / sqrt(c)) v`` of ``[B, 1, n, c]``, never with the scores of all pairs in memory.

    A fused kernel holds none of them. Where there is none (on devices but CPUs and NVIDIA's and AMD's GPUs, for some
    widths and settings), some queries go after others; each has its own softmax, so the result is the same.
    """
    batch, heads, tokens, _ = q.shape
    if tokens**2 * batch * heads <= ATTENTION_SCORES or _is_fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    queries = max(1, ATTENTION_SCORES // (tokens * batch * heads))
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(queries, dim=2)], dim=2)


def _is_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch has an attention kernel for these tensors that does not hold the scores of all pairs."""
    try:
        return torch._fused_sdp_choice(q, k, v) not in (SDPBackend.MATH.value, SDPBackend.ERROR.value)
    except (AttributeError, NotImplementedError, RuntimeError):  # a torch or a device that does not tell
        return False
