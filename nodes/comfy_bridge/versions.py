"""Differences between the ComfyUI versions this pack runs on, 0.3.75 to 0.33.0."""

import dataclasses
import inspect
import math
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...davae_core.errors import LatentError

_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def node_schema(**settings: Any) -> io.Schema:
    """``io.Schema`` without the settings this ComfyUI does not know yet (search_aliases and the like).

    An unknown setting would raise, and one node that raises takes the whole pack with it.
    """
    return io.Schema(**{name: value for name, value in settings.items() if name in _SCHEMA_FIELDS})


def intermediate_dtype() -> torch.dtype:
    """The dtype of latents and images between nodes; always float32 before there was a switch for it."""
    chosen = getattr(comfy.model_management, "intermediate_dtype", None)
    return chosen() if chosen else torch.float32


def empty(*shape: int) -> torch.Tensor:
    """Zeros on ComfyUI's device and in its dtype for what travels between nodes; a LatentError where memory ends."""
    management, dtype = comfy.model_management, intermediate_dtype()
    device = management.intermediate_device()
    need, free = math.prod(shape) * management.dtype_size(dtype), management.get_free_memory(device)
    if need > free:
        raise LatentError(
            f"an empty latent of shape {list(shape)} takes {need / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of "
            "memory are free. Choose a smaller size or a smaller batch"
        )
    return torch.zeros(shape, device=device, dtype=dtype)


def core_patcher(
    model: torch.nn.Module, load_device: torch.device, offload_device: torch.device, disable_dynamic: bool = False
) -> ModelPatcher:
    """A patcher of the kind ComfyUI's own loaders use; it is chosen at start, so it is looked up at each call."""
    kind = ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    return kind(model, load_device=load_device, offload_device=offload_device)


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Whether weights are loaded layer by layer while the model runs; then tensors must be assigned, not copied."""
    return getattr(patcher, "is_dynamic", bool)()


def inference_dtype(model: comfy.model_base.BaseModel) -> torch.dtype:
    """The dtype a model computes in, which is not that of its weights when those are cast on the fly."""
    return model.manual_cast_dtype or model.get_dtype()


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """What a checkpoint holds of a quantised tensor, which some versions leave whole in a state dict."""
    return getattr(tensor, "_qdata", tensor)


def unload(patcher: ModelPatcher) -> None:
    """Take a model's LoRA out of its weights and its weights off every GPU, as ComfyUI does when memory is short."""
    management = comfy.model_management
    if hasattr(management, "unload_model_and_clones"):
        asked = inspect.signature(management.unload_model_and_clones).parameters
        management.unload_model_and_clones(patcher, **({"all_devices": True} if "all_devices" in asked else {}))
        return
    for loaded in [entry for entry in management.current_loaded_models if patcher.is_clone(entry.model)]:
        loaded.model_unload()
        management.current_loaded_models.remove(loaded)


def archive_dtypes(module: torch.nn.Module) -> None:
    """Tell a ComfyUI that remembers the dtype of every weight that these are the right ones now."""
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive:
        archive(module)
