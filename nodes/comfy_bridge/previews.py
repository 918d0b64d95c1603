"""Previews with their detail, where models/vae_approx holds a tiny decoder of the DA-VAE.

ComfyUI chooses a previewer by the latent format, and knows decoders of three enlargements alone, whose names are in its
code. So the one function that chooses is wrapped, as other packs do: for formats of ours with a decoder that fits it
gives a previewer of ComfyUI's own kind; everything else goes to the function as it was.
"""

import functools
import logging
from typing import Any

import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args

from ...davae_core.errors import DAVAEError
from ...davae_core.tiny_decoder import TinyDecoder
from . import tiny_decoder
from .memory import is_oom

# latent2rgb stays what it says.
METHODS = (LatentPreviewMethod.TAESD, LatentPreviewMethod.Auto)
ROWS = 512  # of an image that are decoded at once

_WRAPPED = "davae_previews"


def install_previews() -> None:
    """Let ComfyUI preview our latents with a tiny decoder; once, however often it is called."""
    stock = latent_preview.get_previewer
    if getattr(stock, _WRAPPED, False):
        return

    @functools.wraps(stock)
    def get_previewer(device: torch.device, latent_format: Any, *more: Any, **named: Any) -> Any:
        decoder = _decoder(latent_format)
        if decoder is None:
            return stock(device, latent_format, *more, **named)
        return TinyDecoderPreviewer(decoder, device)

    setattr(get_previewer, _WRAPPED, True)
    latent_preview.get_previewer = get_previewer


def _decoder(latent_format: Any) -> TinyDecoder | None:
    """The tiny decoder to preview latents of this format with, where one is wanted and fits."""
    spec = getattr(latent_format, "davae_latent", None)
    if spec is None or args.preview_method not in METHODS:
        return None
    name = tiny_decoder.fitting(spec)
    if name is None:
        return None
    try:
        return tiny_decoder.kept(name)
    except DAVAEError as problem:
        logging.warning("DA-VAE: no previews by the tiny decoder (%s)", problem)
        return None


class TinyDecoderPreviewer(latent_preview.TAESDPreviewerImpl):
    """ComfyUI's previewer around a decoder; what it shows is the picture in full."""

    def __init__(self, model: TinyDecoder, device: torch.device) -> None:
        super().__init__(_Decoder(model, device))

    def decode_latent_to_preview_image(self, preview_format: str, x0: torch.Tensor) -> Any:
        """As ComfyUI's; None, which is no preview of this step, where memory has run out: sampling goes on."""
        try:
            return super().decode_latent_to_preview_image(preview_format, x0)
        except Exception as problem:
            if not is_oom(problem):
                raise
        logging.warning("DA-VAE: not enough memory for a preview; the picture is sampled without")
        return None


class _Decoder:
    """A tiny decoder with the one method that ComfyUI's previewer calls."""

    def __init__(self, model: TinyDecoder, device: torch.device) -> None:
        self.model = model.to(device)

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """``[B, C + D, h, w]`` in the diffusion model's units to ``[B, 3, H, W]``, about [-1, 1], float32."""
        return self.model.tiled(x0.to(self.model[1].weight), ROWS).float()
