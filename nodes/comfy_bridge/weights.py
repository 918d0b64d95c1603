"""The weights of a MODEL as its file has them: without LoRA, plain or quantised."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...davae_core.errors import DAVAEError
from .versions import inference_dtype, stored

NETWORK = "diffusion_model."


def saved_weights(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """Tensors as loaded from the file, of layers that hold a LoRA's result now: a LoRA that is in use lives in the
    weights, and the patcher keeps the originals. After :func:`unload` there should be none left."""
    return {key: saved[0] for key, saved in {**patcher.backup, **patcher.hook_backup}.items()}


def original_weights(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """The network's state dict, without LoRA, by names of the SD3.5 layout."""
    state, saved = patcher.model_state_dict(NETWORK), saved_weights(patcher)
    found = {}
    for key, tensor in state.items():
        weight = saved.get(key, tensor)
        if weight.is_meta:  # layers of GGUF loaders show their sizes alone, to have the memory counted
            weight = _attribute(patcher, key)
        if weight is not None:
            found[key.removeprefix(NETWORK)] = tensor_of_its_own(stored(weight))
    return found


def tensor_of_its_own(tensor: torch.Tensor, deep: bool = False) -> torch.Tensor:
    """Another tensor object on the same memory, or with ``deep`` on a copy of it.

    Tensors of GGUF loaders carry their LoRA as an attribute, and give themselves for ``detach`` and ``clone``.
    """
    plain = tensor.data.as_subclass(torch.Tensor)
    made = (plain.clone() if deep else plain).as_subclass(type(tensor.data))
    for name, value in vars(tensor.data if type(tensor) is torch.nn.Parameter else tensor).items():
        setattr(made, name, [] if name == "patches" else value)
    return made


def plain_weight(patcher: ModelPatcher, key: str) -> torch.Tensor:
    """A weight without quantisation and without LoRA; ``key`` is its path in the inner model."""
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    weight = saved_weights(patcher).get(key, weight)
    layer = comfy.utils.get_attr(patcher.model, key.rpartition(".")[0])
    if getattr(weight, "tensor_type", None) is not None and hasattr(layer, "get_weight"):  # a layer of a GGUF loader
        return layer.get_weight(weight, inference_dtype(patcher.model))
    return weight if convert is None else convert(weight, inplace=False)


def require_filled(network: torch.nn.Module, missing: Sequence[str]) -> None:
    """Raise DAVAEError if a network has parameters that were not in the state dict it was given.

    Args:
        network: built anew and loaded.
        missing: names that its loading missed.
    """
    tensors = dict(chain(network.named_parameters(), network.named_buffers()))
    empty = [name for name in tensors if tensors[name].is_meta or name in missing]
    if empty:
        raise DAVAEError(
            f"the MODEL's weights cannot be read: {', '.join(empty[:3])} ... It was loaded in a form that is not known "
            "here. Load SD3.5 from a safetensors file with ComfyUI's own loader, in fp8 where memory is short"
        )


def _attribute(patcher: ModelPatcher, key: str) -> Any:
    try:
        return comfy.utils.get_attr(patcher.model, key)
    except AttributeError:
        return None
