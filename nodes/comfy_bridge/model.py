"""The model class of adapted SD3.5 models, and its configuration as ComfyUI wants it."""

from typing import Any

import comfy.model_base
import comfy.supported_models
import torch

from ...davae_core.adapter import Recommended
from ...davae_core.errors import DAVAEError, LatentError
from ...davae_core.history import History
from ...davae_core.latent import LatentSpec
from . import bypass, merges
from .finite import note_nan
from .history import note_sampled
from .latent_format import latent_format, require_channels


class AdaptedSD3(comfy.model_base.SD3):
    """ComfyUI's SD3 with C + D latent channels; everything it does, it does as SD3 does.

    Attributes:
        davae_latent: channels, scale and normalisation of the latent.
        davae_recommended: sampling settings of the adapter, 0 where it names none.
        davae_history: how the adapter was trained, where its file tells.
        davae_exact: whether embedder and head are those that were trained, up to rounding: not made from layers that
            were quantised, or on which there was a LoRA.
    """

    davae_latent: LatentSpec
    davae_recommended: Recommended
    davae_history: History | None = None
    davae_exact: bool = True

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Called once before sampling, with every sampler: the place to refuse what would fail inside the network."""
        noise = kwargs.get("noise")
        if noise is not None:
            check_latent(self, noise.shape)
            check_area(noise.shape, kwargs.get("area"))
        patcher = getattr(self, "current_patcher", None)  # the one that is sampled with
        if patcher is not None:
            bypass.require_fitting(patcher)
            merges.require_fitting(patcher)
        check_conditioning(self, kwargs.get("cross_attn"), kwargs.get("pooled_output"))
        if kwargs.get("control") is not None:
            raise DAVAEError(
                "the CONDITIONING carries a ControlNet, but ControlNets for SD3 read latents of 16 channels at 1/8 and "
                "do not fit an adapted MODEL; remove the ControlNet, or use the unadapted model"
            )
        return super().extra_conds(**kwargs)

    def process_latent_out(self, latent: torch.Tensor) -> torch.Tensor:
        """Called after sampling, with every sampler."""
        latent = super().process_latent_out(latent)
        note_sampled(self.davae_history, latent)
        note_nan(self.diffusion_model, latent)
        return latent


def check_latent(model: comfy.model_base.BaseModel, shape: tuple[int, ...]) -> None:
    """Raise LatentError unless a latent of this shape can be sampled with an adapted model."""
    spec: LatentSpec = model.davae_latent
    require_channels(spec, shape)
    network = model.diffusion_model
    most = network.pos_embed_max_size * network.patch_size
    if max(shape[2:]) > most:
        width, height = shape[3] * spec.factor, shape[2] * spec.factor
        raise LatentError(
            f"{width} x {height} px is too large for this model: its position grid ends at {most * spec.factor} px a "
            "side. Choose a smaller size"
        )


def check_area(shape: tuple[int, ...], area: Any) -> None:
    """Raise DAVAEError for an area that begins outside of the latent; ComfyUI cuts off what only ends there.

    Args:
        shape: of the latent.
        area: sizes, then beginnings, in latent pixels and one for each dimension. ComfyUI reads the first of each.
    """
    if area is None:
        return
    begins = area[len(area) // 2 :]
    if any(begin >= side for begin, side in zip(begins, shape[2:], strict=False)):
        raise DAVAEError(
            "the CONDITIONING is set to an area that begins outside of the image: Conditioning (Set Area) counts in "
            "pixels of ordinary latents. Use Conditioning (Set Area with Percentage) for DA-VAE latents"
        )


def check_conditioning(model: comfy.model_base.BaseModel, context: Any, pooled: Any) -> None:
    """Raise DAVAEError unless a CONDITIONING has the text tokens and the pooled vector that the model reads."""
    network = model.diffusion_model
    wanted = (network.context_embedder.in_features, network.y_embedder.mlp[0].in_features)
    given = tuple(0 if part is None else part.shape[-1] for part in (context, pooled))
    if given != wanted:
        raise DAVAEError(
            f"the CONDITIONING has text tokens of width {given[0]} and a pooled vector of width {given[1]}, but the "
            f"MODEL reads {wanted[0]} and {wanted[1]}. Encode the prompts with the text encoders that belong to the "
            "MODEL (for SD3.5: TripleCLIPLoader, or the checkpoint's CLIP)"
        )


def is_sd3(model: Any) -> bool:
    """Whether a MODEL's inner model is an SD3 / SD3.5."""
    return isinstance(model, comfy.model_base.SD3)


def model_config(
    spec: LatentSpec, unet_config: dict[str, Any], sampling: dict[str, Any] | None = None, shift: float = 0
) -> comfy.supported_models.SD3:
    """The configuration ComfyUI builds the model from.

    Args:
        spec: the latent.
        unet_config: the network's shape as ComfyUI detects it; its channel counts are replaced.
        sampling: sampling settings of the base model, by default those of SD3.
        shift: the time shift that the adapter recommends, 0 for that of the base model. Every sampler starts from it.
    """

    class AdaptedSD3Config(comfy.supported_models.SD3):
        """SD3 with our channels and latent format."""

        def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> AdaptedSD3:
            return AdaptedSD3(self, device=device)

    AdaptedSD3Config.unet_config = {**comfy.supported_models.SD3.unet_config, "in_channels": spec.channels}
    AdaptedSD3Config.latent_format = latent_format(spec)
    settings = comfy.supported_models.SD3.sampling_settings if sampling is None else sampling
    AdaptedSD3Config.sampling_settings = {**settings, "shift": shift} if shift else dict(settings)
    return AdaptedSD3Config({**unet_config, "in_channels": spec.channels, "out_channels": spec.channels})


def describe(model: Any) -> str:
    """A MODEL in words, for messages."""
    if isinstance(model, AdaptedSD3):
        return f"an adapted SD3.5 model with {model.davae_latent.channels} latent channels"
    channels = getattr(getattr(model, "latent_format", None), "latent_channels", "unknown")
    return f"a {type(model).__name__} model with {channels} latent channels"


def require_adapted(model: Any, also: str = "") -> AdaptedSD3:
    """The inner model of an adapted MODEL, or a DAVAEError that says what to do; ``also`` ends its last sentence."""
    if not isinstance(model, AdaptedSD3):
        raise DAVAEError(
            f"the MODEL is not adapted to DA-VAE latents: it is {describe(model)}. Put a DA-VAE Adapter node between "
            f"the model loader and this node{also}"
        )
    return model
