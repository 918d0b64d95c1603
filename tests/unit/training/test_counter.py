"""Counting on fake tensors: bytes, precision, operations."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from davae_core.training.planning.counter import Counter, counting, off_device


def test_what_is_freed_no_longer_counts_and_views_count_once() -> None:
    with counting() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:].t()
        assert memory.live == 4000
        c = a + 1
        del a, c
        assert (memory.live, memory.peak) == (4000, 8000)
        del b
        assert memory.live == 0
        memory.restart()
        assert memory.peak == 0


def test_what_is_in_the_computers_memory_does_not_count_until_it_comes_to_the_device() -> None:
    def made(memory: Counter) -> int:
        with off_device(memory):
            x = torch.zeros(1000)
        y = torch.cat([x, x])
        assert memory.live == 0
        there = y.to(torch.device("cpu"))
        assert memory.live == 8000
        back = (there + 1).cpu()
        assert (memory.live, memory.peak) == (8000, 16000)
        return len(back)

    with counting() as memory:
        assert made(memory) == 2000


def test_norms_and_enlarging_are_in_fp32_under_cudas_autocast_and_products_are_not() -> None:
    x, q = torch.zeros(1, 32, 4, 4), torch.zeros(1, 1, 8, 16)
    conv, linear = nn.Conv2d(32, 32, 1), nn.Linear(16, 16)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16):
            low, row = conv(x), linear(q)
            norms = [F.group_norm(low, 32), F.layer_norm(row, (16,)), F.rms_norm(row, (16,))]
            large = F.interpolate(low, scale_factor=2.0, mode="nearest")
            return [y.dtype for y in (low, row, F.scaled_dot_product_attention(row, row, row), *norms, large)]

    half, full = torch.bfloat16, torch.float32
    with counting():
        assert dtypes() == [half] * 3 + [full] * 4
    with counting(cuda=False):
        assert full not in dtypes()[:3] and half in dtypes()[3:]
    assert half in dtypes()[3:], "the rules stay when the counting ends"


def test_operations_are_those_of_pytorchs_own_counter() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)[:, None]
            q, k, v = (part.contiguous() for part in self.linear(tokens).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v)

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        Model()(torch.zeros(2, 3, 8, 8))
    with counting() as memory:
        model, x = Model(), torch.zeros(2, 3, 8, 8)
        y = model(x)
        forward = memory.flops
        y.sum().backward()
    attention = 4 * 2 * 64**2 * 16
    assert forward == counter.get_total_flops()
    # Backward: the linear layer twice, the convolution's weights, attention 2.5 times.
    linear, conv = 2 * 2 * 64 * 16 * 48, 2 * 2 * 64 * 27 * 16
    assert memory.flops - forward == 2 * linear + conv + 2.5 * attention
