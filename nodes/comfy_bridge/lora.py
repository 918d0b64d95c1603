"""A LoRA of the trunk on a MODEL, as ordinary patches: merged into the weights at loading, no cost per step."""

from collections.abc import Mapping
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher

from ...davae_core.errors import DAVAEError


def add_lora(patcher: ModelPatcher, lora: Mapping[str, torch.Tensor], strength: float, name: str) -> None:
    """Put a LoRA on an adapted MODEL, beside what is on it already, as ComfyUI's LoRA loaders do.

    Args:
        patcher: the MODEL; it is changed.
        lora: tensors in diffusers' names, see :mod:`davae_core.lora`.
        strength: factor on it.
        name: its file, for messages.

    Raises:
        DAVAEError: the MODEL lacks a layer that the LoRA changes.
    """
    if not lora:
        return
    loaded: dict[Any, Any] = comfy.lora.load_lora(dict(lora), comfy.lora.model_lora_keys_unet(patcher.model, {}))
    added = patcher.add_patches(loaded, strength)
    expected = sum(key.endswith(".lora_A.weight") for key in lora)
    if len(added) != expected:
        raise DAVAEError(
            f"{name} changes {expected} layers of the trunk, but the MODEL has only {len(added)} of them; use the "
            "model it was trained for"
        )
