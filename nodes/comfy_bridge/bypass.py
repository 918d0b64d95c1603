"""LoRAs that ComfyUI adds to a layer's output and not to its weights ("bypass", in newer versions).

They live in a patcher's injections, bound to the layers of one inner model, so they are made anew for another.
"""

from collections.abc import Iterator
from typing import Any

import comfy.utils
import comfy.weight_adapter
import torch
from comfy.model_patcher import ModelPatcher

from ...davae_core.errors import DAVAEError

KEY = "bypass_lora"  # of the injections


def adapters(patcher: ModelPatcher) -> Iterator[tuple[str, Any, float]]:
    """The bypass LoRAs of a patcher: layer (by its path in the inner model), LoRA, strength."""
    for manager in _managers(patcher):
        for layer, (adapter, strength) in manager.adapters.items():
            yield layer, adapter, strength


def weight_patches(patcher: ModelPatcher, key: str) -> list[tuple]:
    """What the bypass LoRAs of one layer do, as patches of its weight ``key``."""
    return [
        (strength, adapter, 1.0, None, None)
        for layer, adapter, strength in adapters(patcher)
        if f"{layer}.weight" == key
    ]


def carry(base: ModelPatcher, patcher: ModelPatcher, without: tuple[str, ...]) -> None:
    """Put the bypass LoRAs of ``base`` on a patcher around another model of the same trunk.

    Args:
        base, patcher: from, to.
        without: names of weights in the network whose LoRAs are left out.
    """
    widened = {f"diffusion_model.{name}" for name in without}
    kept = [entry for entry in adapters(base) if f"{entry[0]}.weight" not in widened]
    if kept:
        manager = _manager_class()()
        for layer, adapter, strength in kept:
            manager.add_adapter(layer, adapter, strength=strength)
        patcher.set_injections(KEY, manager.create_injections(patcher.model))
    elif _managers(base):
        patcher.set_injections(KEY, [])


def require_fitting(patcher: ModelPatcher) -> None:
    """Raise DAVAEError if a bypass LoRA has another number of channels than its layer in this patcher's model.

    An ordinary LoRA like that is left out by ComfyUI, with a line in the log; this one would fail in the network.
    """
    for layer, adapter, _ in adapters(patcher):
        weight = comfy.utils.get_attr(patcher.model, f"{layer}.weight")
        up, down = (*getattr(adapter, "weights", ()), None, None)[:2]
        if not isinstance(up, torch.Tensor) or not isinstance(down, torch.Tensor) or down.ndim != weight.ndim:
            continue  # not of the common kind
        given, wanted = (up.shape[0], down.shape[1]), tuple(weight.shape[:2])
        if given != wanted:
            raise DAVAEError(
                f"a bypass LoRA changes {layer} from {given[1]} to {given[0]} channels, but the adapted MODEL has "
                f"{wanted[1]} to {wanted[0]} there. Put the LoRA before the DA-VAE Adapter, where that layer counts, "
                "too, or load it with an ordinary LoRA loader, which leaves the layer out"
            )


def _manager_class() -> Any:
    return getattr(comfy.weight_adapter, "BypassInjectionManager", None)


def _managers(patcher: ModelPatcher) -> list[Any]:
    """ComfyUI keeps them in the closures of the injections alone."""
    kind = _manager_class()
    if kind is None:
        return []
    closures = [injection.inject.__closure__ or () for injection in patcher.injections.get(KEY, [])]
    return [cell.cell_contents for cells in closures for cell in cells if isinstance(cell.cell_contents, kind)]
