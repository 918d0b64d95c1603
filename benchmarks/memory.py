"""Peak memory of a call: on a GPU what torch has allocated, on a CPU the resident memory of the process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> tuple[int, int]:
    """Bytes of this process in memory now, and the most there have been."""
    if _STATUS.is_file():  # not getrusage, whose peak is inherited from the process that started this one
        text = _STATUS.read_text(encoding="ascii", errors="replace")
        now, peak = (re.search(rf"^{name}:\s+(\d+) kB", text, re.M) for name in ("VmRSS", "VmHWM"))
        if now and peak:
            return int(now[1]) * 1024, int(peak[1]) * 1024
    import psutil  # comes with ComfyUI

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return info.rss, info.peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return info.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let the peak begin anew, where the system can do that.

    What the C library keeps of freed memory goes back to the system first: a tensor put there would not be seen.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        _REFERENCES.write_text("5", encoding="ascii")


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes that a call needs on top of what is there before it.

    On a CPU without glibc this is right in a fresh process alone: memory that was used before and is kept by the
    allocator is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    before, _ = resident()
    call()
    return max(resident()[1] - before, 0)
