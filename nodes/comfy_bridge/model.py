"""The model class of adapted SD3.5 models, and its configuration as ComfyUI wants it."""

from typing import Any

import comfy.model_base
import comfy.supported_models

from ...davae_core.adapter import Recommended
from ...davae_core.errors import DAVAEError, LatentError
from ...davae_core.latent import LatentSpec
from .latent_format import latent_format


class AdaptedSD3(comfy.model_base.SD3):
    """ComfyUI's SD3 with C + D latent channels; everything it does, it does as SD3 does.

    Attributes:
        davae_latent: channels, scale and normalisation of the latent.
        davae_recommended: sampling settings of the adapter, 0 where it names none.
    """

    davae_latent: LatentSpec
    davae_recommended: Recommended

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Called once before sampling, with every sampler: the place to refuse what would fail inside the network."""
        noise = kwargs.get("noise")
        if noise is not None:
            check_latent(self, noise.shape)
        return super().extra_conds(**kwargs)


def check_latent(model: comfy.model_base.BaseModel, shape: tuple[int, ...]) -> None:
    """Raise LatentError unless a latent of this shape can be sampled with an adapted model."""
    spec: LatentSpec = model.davae_latent
    if len(shape) != 4 or shape[1] != spec.channels:
        raise LatentError(
            f"the LATENT has {shape[1] if len(shape) > 1 else 'no'} channels, but the adapted MODEL works on "
            f"{spec.channels} ({spec.base_channels} base + {spec.detail_channels} detail). Make it with Empty DA-VAE "
            f"Latent "
            "or Detail Encode, or turn an ordinary SD3 latent into one with Base to DA-VAE Latent"
        )
    network = model.diffusion_model
    most = network.pos_embed_max_size * network.patch_size
    if max(shape[2:]) > most:
        width, height = shape[3] * spec.factor, shape[2] * spec.factor
        raise LatentError(
            f"{width} x {height} px is too large for this model: its position grid ends at {most * spec.factor} px a "
            f"side. "
            "Choose a smaller size"
        )


def is_sd3(model: Any) -> bool:
    """Whether a MODEL's inner model is an SD3 / SD3.5."""
    return isinstance(model, comfy.model_base.SD3)


def model_config(spec: LatentSpec, unet_config: dict[str, Any]) -> comfy.supported_models.SD3:
    """The configuration ComfyUI builds the model from.

    Args:
        spec: the latent.
        unet_config: the network's shape as ComfyUI detects it; its channel counts are replaced.
    """

    class AdaptedSD3Config(comfy.supported_models.SD3):
        """SD3 with our channels and latent format."""

        def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> AdaptedSD3:
            return AdaptedSD3(self, device=device)

    AdaptedSD3Config.unet_config = {**comfy.supported_models.SD3.unet_config, "in_channels": spec.channels}
    AdaptedSD3Config.latent_format = latent_format(spec)
    return AdaptedSD3Config({**unet_config, "in_channels": spec.channels, "out_channels": spec.channels})


def describe(model: Any) -> str:
    """A MODEL in words, for messages."""
    if isinstance(model, AdaptedSD3):
        return f"an adapted SD3.5 model with {model.davae_latent.channels} latent channels"
    channels = getattr(getattr(model, "latent_format", None), "latent_channels", "unknown")
    return f"a {type(model).__name__} model with {channels} latent channels"


def require_adapted(model: Any) -> AdaptedSD3:
    """The inner model of an adapted MODEL, or a DAVAEError that says what to do."""
    if not isinstance(model, AdaptedSD3):
        raise DAVAEError(
            f"the MODEL is not adapted to DA-VAE latents: it is {describe(model)}. Put a DA-VAE Adapter node between "
            f"the "
            "model loader and this node, or choose an adapter file in this node"
        )
    return model
