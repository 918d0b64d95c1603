"""The machine that figures were taken on, by what matters for them."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch


def describe(device: str) -> dict[str, Any]:
    """CPU or GPU by model, how many cores torch uses, and the version of torch."""
    found: dict[str, Any] = {"torch": torch.__version__, "cpu": cpu_model(), "threads": torch.get_num_threads()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def name(machine: dict[str, Any]) -> str:
    """In a few words."""
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"


def cpu_model() -> str:
    """As the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.M)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def matmul_flops(device: str, dtype: torch.dtype, side: int = 0) -> float:
    """Operations per second of a large square matrix product: what the machine's arithmetic can reach in practice."""
    side = side or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for _ in range(6):
        synchronise()
        start = time.perf_counter()
        a @ b
        synchronise()
        taken.append(time.perf_counter() - start)
    return 2 * side**3 / min(taken[1:])


def load() -> float | None:
    """How many processes wanted to run in the last minute, on average; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
