"""Load a merged model: a whole diffusion model that already has C + D channels."""

from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...davae_core import checkpoints
from .model import model_config
from .versions import core_patcher, is_dynamic


def load_merged(path: Path, dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> ModelPatcher:
    """A MODEL from a merged file.

    Args:
        path: a safetensors file of kind ``model``.
        dtype: of the weights; chosen by ComfyUI for the device when not given.
        disable_dynamic: load all weights at once even where ComfyUI would load them layer by layer.

    Raises:
        CheckpointError: the file cannot be read or is of another kind.
    """
    merged = checkpoints.load_merged(path)
    state = merged.state
    management = comfy.model_management
    shape = comfy.model_detection.detect_unet_config(state, "")
    config = model_config(merged.latent, shape, shift=merged.recommended.shift)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    supported = config.supported_inference_dtypes
    weight_dtype = dtype or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    config.set_inference_dtype(weight_dtype, management.unet_manual_cast(weight_dtype, device, supported))
    model = config.get_model(state, "")
    model.davae_latent, model.davae_recommended = merged.latent, merged.recommended
    model.davae_history = merged.history
    patcher = core_patcher(model, device, offload, disable_dynamic)
    if not management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(state, "", **({"assign": True} if is_dynamic(patcher) else {}))
    patcher.cached_patcher_init = (load_merged, (path, dtype))
    return patcher
