"""Working memory: which of several ways to the same result to take, and the next one when memory runs out."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

# What backends say in a plain RuntimeError: CUDA and MPS, DirectML, the CPU allocators, cuBLAS and cuDNN.
_OUT_OF_MEMORY = (
    "out of memory", "not enough gpu video memory", "can't allocate memory", "not enough memory", "alloc_failed",
)  # fmt: skip


def is_oom(problem: BaseException) -> bool:
    """Whether this error says that memory ran out, on any kind of device."""
    known = getattr(comfy.model_management, "is_oom", None)
    if known is not None and known(problem):
        return True
    if isinstance(problem, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(problem, RuntimeError) and any(text in str(problem).lower() for text in _OUT_OF_MEMORY)


@dataclass(frozen=True)
class Way:
    """One way to a result.

    Attributes:
        name: for the log.
        bytes: working memory it takes beside the weights.
        run: takes the arguments of the call.
    """

    name: str
    bytes: int
    run: Callable[..., torch.Tensor]


class Ways:
    """The same result in several ways, from the fastest to the one that takes the least memory."""

    def __init__(self, patcher: ModelPatcher, ways: Sequence[Way]) -> None:
        self.patcher, self.ways = patcher, tuple(ways)

    def need(self) -> int:
        """Bytes to have ComfyUI free: what will be used. A way that fits into what is free now is taken; where none
        does, the last is, so that no other model is unloaded for the sake of speed."""
        return self.ways[self._first()].bytes

    def frugal(self) -> "Ways":
        """Without the first way."""
        return Ways(self.patcher, self.ways[1:])

    def __call__(self, *args: object) -> torch.Tensor:
        """The result by the first way for which memory suffices; what the last one raises is raised."""
        ways = self.ways[self._first() :]
        for way, after in zip(ways, ways[1:], strict=False):
            try:
                return way.run(*args)
            except Exception as problem:
                if not is_oom(problem):
                    raise
            # Here and not above: the exception holds on to the tensors of the attempt.
            logging.warning("DA-VAE: out of memory working %s; trying again %s (same result)", way.name, after.name)
            comfy.model_management.soft_empty_cache()
        return ways[-1].run(*args)

    def _first(self) -> int:
        """Index of the first way that fits into free memory beside the weights, or of the last."""
        patcher, weights = self.patcher, 0
        if patcher.load_device != patcher.offload_device:
            weights = max(0, patcher.model_size() - patcher.loaded_size())
        free = comfy.model_management.get_free_memory(patcher.load_device) - weights
        return next((i for i, way in enumerate(self.ways) if way.bytes <= free), len(self.ways) - 1)
