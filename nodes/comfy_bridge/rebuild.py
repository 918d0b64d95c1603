"""Apply an adapter to the user's MODEL: build a second, independent model that shares the trunk's tensors with it.

Patching the user's model would not do: ComfyUI's previewer reads the shared inner model, and with dynamic loading a
base tensor may be written into a replaced layer. So the user's MODEL is only read.
"""

import copy
import logging
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...davae_core.adapter import EMBED, HEAD, WIDENED, Adapter, check_fits, widen
from ...davae_core.errors import DAVAEError
from .history import note_base
from .model import AdaptedSD3, describe, is_sd3, model_config
from .versions import archive_dtypes, inference_dtype, stored, unload

NETWORK = "diffusion_model."
COMPILED = "torch.compile"  # the wrapper by which ComfyUI's compile nodes put a compiled network in place

# What makes a patcher belong to one inner model; everything else of the user's patcher is carried over.
_OWN = {
    "model", "size", "parent", "pinned", "backup", "backup_buffers", "object_patches_backup", "hook_backup",
    "hook_patches_backup", "cached_hook_patches", "current_hooks", "is_injected", "clone_base_uuid",
    "cached_patcher_init", "non_dynamic_delegate_model", "load_device", "offload_device",
}  # fmt: skip
_CONFIG = ("custom_operations", "optimizations", "scaled_fp8", "quant_config", "manual_cast_dtype")


def apply_adapter(base: ModelPatcher, adapter: Adapter, strength: float = 1.0, name: str = "adapter") -> ModelPatcher:
    """A new MODEL that speaks C + D channels; ``base`` stays as it is, bit for bit.

    Args:
        base: an SD3 / SD3.5 MODEL, with whatever LoRA, sampling settings and options it carries.
        adapter: what to apply.
        strength: factor on what the adapter changes in the pretrained weights (its LoRA and the changes of P and O).
        name: the adapter's file, for messages.

    Raises:
        DAVAEError: the MODEL is of another kind, already adapted, or of another size.
    """
    return _Rebuild(base, adapter, strength, name).run()


class _Rebuild:
    """One application of an adapter; kept by the new patcher so that ComfyUI can repeat it on another device."""

    def __init__(self, base: ModelPatcher, adapter: Adapter, strength: float, name: str) -> None:
        self.base, self.adapter, self.strength, self.name = base, adapter, strength, name

    def run(self, disable_dynamic: bool = False) -> ModelPatcher:
        inner = self.base.model
        if isinstance(inner, AdaptedSD3):
            raise DAVAEError(f"the MODEL is already {describe(inner)}; connect the unadapted model instead")
        if not is_sd3(inner):
            raise DAVAEError(
                f"{self.name} adapts Stable Diffusion 3 / 3.5 models, but the MODEL is {describe(inner)}. Load "
                "SD3.5-medium and connect that"
            )
        patcher = self._new_patcher(self._new_model(), disable_dynamic)
        self._add_lora(patcher)
        return patcher

    def _new_model(self) -> AdaptedSD3:
        """The inner model: new embedder and head, every other tensor shared with the base."""
        unload(self.base)
        old = self.base.model
        spec = self.adapter.config.latent
        shift = self.adapter.config.recommended.shift
        config = model_config(spec, old.model_config.unet_config, old.model_config.sampling_settings, shift)
        known = dir(old.model_config)  # its getattr answers None to anything, so hasattr is no test
        for name in _CONFIG:
            if name in known:
                setattr(config, name, copy.copy(getattr(old.model_config, name)))
        quantised = any(name in known and getattr(old.model_config, name) for name in ("scaled_fp8", "quant_config"))

        state = self._original_weights()
        note_base(self.adapter, self.name, state)
        plain = {name: self._plain_weight(name) for name in WIDENED}
        check_fits(self.adapter.config, tuple(plain[WIDENED[0]].shape), tuple(plain[WIDENED[2]].shape))
        for name in [name for name in state if name.startswith((EMBED, HEAD))]:
            if name.endswith(("scale_weight", "scale_input")):
                state[name] = torch.ones_like(state[name])  # the new layers hold plain weights
            else:
                del state[name]
        state |= widen(plain, self.adapter, self.strength)

        with torch.no_grad():
            # Quantised layers make tensors of their own when they are built, so those cannot be built without memory.
            model = config.get_model({}, device=None if quantised else torch.device("meta"))
            missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False, assign=True)
        empty = [key for key, value in model.diffusion_model.state_dict().items() if value.is_meta]
        if empty:
            raise DAVAEError(f"the MODEL lacks tensors of an SD3.5 model: {', '.join((missing or empty)[:3])} ...")
        if unexpected:
            logging.warning("DA-VAE: tensors of the MODEL that its network does not use: %s", ", ".join(unexpected[:3]))
        model.device = old.device
        model.davae_latent = spec
        model.davae_recommended = self.adapter.config.recommended
        model.davae_history = self.adapter.history
        archive_dtypes(model.diffusion_model)
        return model

    def _saved(self) -> dict[str, torch.Tensor]:
        """Tensors as loaded from the file, of layers that hold a LoRA's result now: a LoRA that is in use lives in the
        weights, and the patcher keeps the originals. After :func:`unload` there should be none left."""
        return {key: saved[0] for key, saved in {**self.base.backup, **self.base.hook_backup}.items()}

    def _original_weights(self) -> dict[str, torch.Tensor]:
        """The base network's state dict, without LoRA, by names of the SD3.5 layout."""
        state = self.base.model_state_dict(NETWORK)
        saved = {key: tensor for key, tensor in self._saved().items() if key in state}
        return {key.removeprefix(NETWORK): stored(tensor) for key, tensor in {**state, **saved}.items()}

    def _plain_weight(self, name: str) -> torch.Tensor:
        """A tensor of the base network without quantisation, in the dtype the network computes in.

        What a LoRA or a merge has put on this layer is counted in; it cannot be carried over to a layer of another
        shape.
        """
        key, dtype = NETWORK + name, inference_dtype(self.base.model)
        weight, _, convert = comfy.model_patcher.get_key_weight(self.base.model, key)
        weight = self._saved().get(key, weight)
        weight = weight if convert is None else convert(weight, inplace=False)
        if key in self.base.patches:
            weight = comfy.lora.calculate_weight(self.base.patches[key], weight.to(torch.float32, copy=True), key)
        return weight.to(dtype)

    def _new_patcher(self, model: AdaptedSD3, disable_dynamic: bool) -> ModelPatcher:
        """A patcher of the base's kind around the new model, carrying what the user put on the base."""
        kind = ModelPatcher if disable_dynamic else type(self.base)
        patcher = kind(model, load_device=self.base.load_device, offload_device=self.base.offload_device)
        for name, value in vars(self.base.clone()).items():
            if name not in _OWN:
                setattr(patcher, name, value)
        for name in WIDENED:
            patcher.patches.pop(NETWORK + name, None)  # already counted in, see _plain_weight
        for key in [
            key for key in patcher.object_patches if key == "latent_format" or key.startswith("diffusion_model")
        ]:
            logging.warning(
                "DA-VAE: the patch of %s on the MODEL is left out: it belongs to the unadapted network", key
            )
            del patcher.object_patches[key]
        if patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED):
            logging.warning("DA-VAE: the MODEL was compiled before the adapter; put the compile node after the adapter")
            patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILED)
        patcher.cached_patcher_init = (self.run, ())
        return patcher

    def _add_lora(self, patcher: ModelPatcher) -> None:
        """The adapter's trunk LoRA as ordinary patches: merged into the weights at loading, no cost per step."""
        lora = self.adapter.lora_state()
        if not lora:
            return
        loaded: dict[Any, Any] = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(patcher.model, {}))
        added = patcher.add_patches(loaded, self.strength)
        expected = sum(name.endswith(".lora_A.weight") for name in lora)
        if len(added) != expected:
            raise DAVAEError(
                f"{self.name} changes {expected} layers of the trunk, but the MODEL has only {len(added)} of them; use "
                "the model the adapter was trained for"
            )
