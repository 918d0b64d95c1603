"""Where and how large: the settings of a run, which every side is built from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from davae_core.mmdit import MMDiTConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DUAL_SHARE = 13 / 24  # of SD3.5-medium's blocks, the first ones, attend twice
TEXT_TOKENS = 154  # of CLIP and T5 together, as ComfyUI encodes a prompt of ordinary length

# Width of the diffusion model and the number of its blocks; ComfyUI's own files have width = 64 x blocks.
SCALES = {"full": (1536, 24), "small": (768, 12), "toy": (128, 2)}


@dataclass(frozen=True)
class Setup:
    """Settings.

    Attributes:
        device: "cpu" or "cuda".
        dtype: a key of :data:`DTYPES`.
        scale: a key of :data:`SCALES`. The autoencoders always have their full width.
        blocks: how many blocks the diffusion model is cut to; 0 for all.
        rank: of the adapter's LoRA.
        batch: pictures at a time; a model call with CFG has twice as many.
        steps: of a picture from noise.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    scale: str = "full"
    blocks: int = 0
    rank: int = 16
    batch: int = 1
    steps: int = 30

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return DTYPES[self.dtype]

    def mmdit(self) -> MMDiTConfig:
        """The unadapted diffusion model: SD3.5-medium's shapes, with as many blocks and as large a share of dual ones
        as asked for."""
        hidden, blocks = SCALES[self.scale]
        blocks = self.blocks or blocks
        dual = tuple(range(max(1, round(blocks * DUAL_SHARE))))
        sizes = {"grid": 96, "context": 64, "pooled": 32} if self.scale == "toy" else {}
        return MMDiTConfig(hidden=hidden, depth=blocks, dual_attention=dual, **sizes)

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)
