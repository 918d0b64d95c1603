"""Few-step LoRAs on an adapted MODEL: patches as of any LoRA, and the settings to sample with.

The settings are an attachment of the patcher, which every clone of it takes along; the inner model, which it shares
with the MODEL that it was made from, knows nothing of them.
"""

from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

from ...davae_core.adapter import WIDENED, Recommended
from ...davae_core.errors import DAVAEError
from ...davae_core.few_steps import FewStepLora
from ...davae_core.latent import LatentSpec
from .history import note_adapted
from .lora import add_lora
from .model import AdaptedSD3, require_adapted
from .weights import NETWORK, plain_weight

_KEY = "davae_few_steps"


def apply_few_steps(model: ModelPatcher, lora: FewStepLora, strength: float = 1.0, name: str = "LoRA") -> ModelPatcher:
    """A clone of an adapted MODEL with a few-step LoRA, to be sampled as the LoRA's file recommends.

    Args:
        model: an adapted MODEL, with whatever else is on it. At a strength of 0 it is what comes back.
        lora: what to apply. Its shift takes the place of the one on the MODEL.
        strength: factor on its changes of the weights; the settings do not depend on it.
        name: its file, for messages.

    Raises:
        DAVAEError: the MODEL is not adapted, or is not of the kind that the LoRA was trained for.
    """
    inner = require_adapted(model.model)
    require_fitting(lora, inner, name)
    if not strength:
        return model
    if inner.davae_exact and lora.history is not None and "adapted_model" in lora.history.of:
        note_adapted(lora.history, name, {key: plain_weight(model, NETWORK + key) for key in WIDENED})
    told = lora.recommended
    patcher = ModelSamplingSD3().patch(model, told.shift)[0] if told.shift else model.clone()
    add_lora(patcher, lora.state, strength, name)
    patcher.set_attachments(_KEY, told)
    return patcher


def recommended(model: ModelPatcher) -> Recommended:
    """How an adapted MODEL is to be sampled: as its few-step LoRA says, where it has one, or else as its adapter does;
    0 where neither says anything."""
    own, told = require_adapted(model.model).davae_recommended, model.get_attachment(_KEY) or Recommended()
    return Recommended(told.size or own.size, told.shift or own.shift, told.cfg or own.cfg, told.steps or own.steps)


def require_fitting(lora: FewStepLora, inner: AdaptedSD3, name: str) -> None:
    """Raise DAVAEError unless a few-step LoRA is for models of this width and latents of this kind."""
    given, wanted = _kind(lora.latent, lora.hidden), _kind(inner.davae_latent, inner.diffusion_model.hidden_size)
    if given != wanted:
        raise DAVAEError(
            f"{name} is for an adapted model of {given}, but the MODEL is one of {wanted}; use the adapted model that "
            "it was trained for, or a few-step LoRA that was trained for this one"
        )


def _kind(spec: LatentSpec, width: int) -> str:
    return f"width {width} with latents of {spec.base_channels} + {spec.detail_channels} channels at 1/{spec.factor}"
