"""Other models' weights that are put on an adapted MODEL, by merges and hooks: the widened layers do not fit them."""

from collections.abc import Iterator
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...davae_core.adapter import WIDENED
from ...davae_core.errors import DAVAEError


def require_fitting(patcher: ModelPatcher) -> None:
    """Raise DAVAEError if another model's weight of another shape would scale, replace or break a widened layer.

    ComfyUI leaves a difference of another shape out, with a line in the log; but a merge has scaled the layer by then.
    """
    for name in WIDENED:
        key = f"diffusion_model.{name}"
        wanted = tuple(comfy.utils.get_attr(patcher.model, key).shape)
        for _, value, strength_model, *_ in _patches(patcher, key):
            kind, given = _weight(value)
            if given is not None and given != wanted and (strength_model != 1.0 or kind != "diff"):
                raise DAVAEError(
                    f"a model merge or hook put after the DA-VAE Adapter brings {name} of shape {list(given)}, but the "
                    f"adapted MODEL has {list(wanted)} there. Merge the models before the DA-VAE Adapter, or merge two "
                    "adapted ones"
                )


def _patches(patcher: ModelPatcher, key: str) -> Iterator[Any]:
    yield from patcher.patches.get(key, [])
    for patches in getattr(patcher, "hook_patches", {}).values():
        yield from patches.get(key, [])


def _weight(value: Any) -> tuple[str, tuple[int, ...] | None]:
    """Kind of a patch and the shape of the weight that it brings; None for LoRAs and what is not known."""
    if isinstance(value, list):  # a whole weight, with patches of its own
        value = ("diff", value[0] if isinstance(value[0], tuple) else (value[0],))
    if not isinstance(value, tuple):
        return "", None
    kind, parts = value if len(value) == 2 and isinstance(value[0], str) else ("diff", value)
    first = parts[0] if len(parts) else None
    return kind, tuple(first.shape) if isinstance(first, torch.Tensor) else None
