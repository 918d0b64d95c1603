"""A few-step LoRA: a second LoRA on an adapted model, with which it draws in 1 to 8 steps and without guidance.

Its tensors are those of any LoRA of an SD3.5 model, in diffusers' names (see :mod:`davae_core.adapter`); what every
sampler does with a LoRA is all that is needed. Its file tells besides how it is to be sampled and which adapted model
it was trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .adapter import Recommended
from .history import History
from .latent import LatentSpec
from .lora import add_lora, lora_width


@dataclass(frozen=True)
class FewStepLora:
    """A few-step LoRA.

    Attributes:
        latent: of the adapted model.
        recommended: steps, shift and guidance (1: none).
        state: tensors under ``transformer.transformer_blocks.N.MODULE.lora_A.weight | lora_B.weight | alpha``.
        history: how it was trained, if known.
    """

    latent: LatentSpec
    recommended: Recommended
    state: dict[str, torch.Tensor]
    history: History | None = None

    @property
    def hidden(self) -> int:
        """Width of the model that it is for."""
        return lora_width(self.state)

    def added(self, model: Mapping[str, torch.Tensor], strength: float = 1.0) -> dict[str, torch.Tensor]:
        """An adapted model's state dict with this LoRA folded in; as :func:`davae_core.adapter.add_lora`."""
        return add_lora(model, self.state, strength)
