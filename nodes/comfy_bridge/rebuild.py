"""Apply an adapter to the user's MODEL: build a second, independent model that shares the trunk's tensors with it.

Patching the user's model would not do: ComfyUI's previewer reads the shared inner model, and with dynamic loading a
base tensor may be written into a replaced layer. So the user's MODEL is only read.
"""

import copy
import logging

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher

from ...davae_core.adapter import EMBED, HEAD, WIDENED, Adapter, check_fits, widen
from ...davae_core.errors import DAVAEError
from ...davae_core.history import fingerprint
from . import bypass, sharing
from .carried import carry_over
from .history import note_base
from .lora import add_lora
from .model import AdaptedSD3, describe, is_sd3, model_config
from .versions import archive_dtypes, inference_dtype, unload
from .weights import NETWORK, original_weights, plain_weight, require_filled, tensor_of_its_own

# What of the old configuration decides how weights are stored and computed with.
_QUANTISED = ("scaled_fp8", "quant_config", "layer_quant_config")
_CONFIG = (*_QUANTISED, "custom_operations", "optimizations", "manual_cast_dtype")


def apply_adapter(base: ModelPatcher, adapter: Adapter, strength: float = 1.0, name: str = "adapter") -> ModelPatcher:
    """A new MODEL with C + D channels; ``base`` stays as it is, bit for bit.

    Args:
        base: an SD3 / SD3.5 MODEL, with whatever LoRA, sampling settings and options it carries.
        adapter: what to apply.
        strength: factor on what the adapter changes in the pretrained weights (its LoRA and the changes of P and O).
        name: the adapter's file, for messages.

    Raises:
        DAVAEError: the MODEL is of another kind, already adapted, of another size, or its weights cannot be read.
    """
    return _Rebuild(base, adapter, strength, name).run()


class _Rebuild:
    """One application of an adapter; kept by the new patcher so that ComfyUI can repeat it on another device."""

    def __init__(self, base: ModelPatcher, adapter: Adapter, strength: float, name: str) -> None:
        self.base, self.adapter, self.strength, self.name = base, adapter, strength, name

    def run(self) -> ModelPatcher:
        inner = self.base.model
        if isinstance(inner, AdaptedSD3):
            raise DAVAEError(f"the MODEL is already {describe(inner)}; connect the unadapted model instead")
        if not is_sd3(inner):
            raise DAVAEError(
                f"{self.name} adapts Stable Diffusion 3 / 3.5 models, but the MODEL is {describe(inner)}. Load "
                "SD3.5-medium and connect that"
            )
        patcher = self._new_patcher(self._new_model(deep=False), type(self.base))
        sharing.keep(patcher, self.base, WIDENED)
        return patcher

    def deep_copy(self, disable_dynamic: bool = False) -> ModelPatcher:
        """The same on weights of its own, for ComfyUI's deep copies: to train on, or to run on another device.

        Outside of inference mode, for nothing can be trained on tensors that are made in it.
        """
        with torch.inference_mode(False):
            model = self._new_model(deep=True)
            return self._new_patcher(model, ModelPatcher if disable_dynamic else type(self.base))

    def _new_model(self, deep: bool) -> AdaptedSD3:
        """The inner model: new embedder and head, every other tensor shared with the base, or a copy of it."""
        unload(self.base)
        old = self.base.model
        spec, recommended = self.adapter.config.latent, self.adapter.config.recommended
        known = dir(old.model_config)  # its getattr answers None to anything, so hasattr is no test
        config = model_config(spec, old.model_config.unet_config, old.model_config.sampling_settings, recommended.shift)
        for name in _CONFIG:
            if name in known:
                setattr(config, name, copy.copy(getattr(old.model_config, name)))
        quantised = any(name in known and getattr(old.model_config, name) for name in _QUANTISED)

        state = original_weights(self.base)
        note_base(self.adapter, self.name, state)
        exact = len(fingerprint("adapted_model", state)) == len(WIDENED) and not any(map(self._patches, WIDENED))
        plain = {name: self._plain_weight(name) for name in WIDENED}
        check_fits(self.adapter.config, tuple(plain[WIDENED[0]].shape), tuple(plain[WIDENED[2]].shape))
        for name in [name for name in state if name.startswith((EMBED, HEAD))]:
            if name.endswith(("scale_weight", "scale_input")):
                state[name] = torch.ones_like(state[name])  # the new layers hold plain weights
            else:
                del state[name]
        state |= widen(plain, self.adapter, self.strength)
        if deep:
            state = {name: tensor_of_its_own(tensor, deep=True) for name, tensor in state.items()}

        with torch.no_grad():
            # Quantised layers make tensors of their own when they are built, so those cannot be built without memory.
            model = config.get_model({}, device=None if quantised else torch.device("meta"))
            missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False, assign=True)
        require_filled(model.diffusion_model, missing)
        if unexpected:
            logging.warning("DA-VAE: tensors of the MODEL that its network does not use: %s", ", ".join(unexpected[:3]))
        model.device = old.device
        model.davae_latent, model.davae_recommended = spec, recommended
        model.davae_history, model.davae_exact = self.adapter.history, exact
        archive_dtypes(model.diffusion_model)
        return model

    def _plain_weight(self, name: str) -> torch.Tensor:
        """A tensor of the base network without quantisation, in the dtype the network computes in.

        What a LoRA or a merge has put on this layer is counted in; it cannot be carried over to a layer of another
        shape.
        """
        key = NETWORK + name
        weight = plain_weight(self.base, key)
        patches = self._patches(name)
        if patches:
            weight = comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), key)
        return weight.to(inference_dtype(self.base.model))

    def _patches(self, name: str) -> list[tuple]:
        """What a LoRA or a merge has put on a tensor of the base network."""
        key = NETWORK + name
        return self.base.patches.get(key, []) + bypass.weight_patches(self.base, key)

    def _new_patcher(self, model: AdaptedSD3, kind: type[ModelPatcher]) -> ModelPatcher:
        """A patcher around the new model, with what the user put on the base and the adapter's LoRA."""
        patcher = kind(model, load_device=self.base.load_device, offload_device=self.base.offload_device)
        carry_over(self.base, patcher)
        patcher.cached_patcher_init = (self.deep_copy, ())
        add_lora(patcher, self.adapter.lora_state(), self.strength, self.name)
        return patcher
