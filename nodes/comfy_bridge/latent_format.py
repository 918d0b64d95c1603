"""The latent format that tells ComfyUI how our latents are scaled and previewed."""

from collections.abc import Sequence

import comfy.latent_formats
import torch

from ...davae_core import bases
from ...davae_core.errors import LatentError
from ...davae_core.latent import LatentSpec


def require_channels(spec: LatentSpec, shape: tuple[int, ...]) -> None:
    """Raise LatentError, in the words of the graph, unless this is the shape of a latent for an adapted model."""
    if len(shape) != 4:
        raise LatentError(
            f"the LATENT has shape {list(shape)}, as of a video or of sound; the adapted MODEL makes pictures, [batch, "
            f"{spec.channels}, height/{spec.factor}, width/{spec.factor}]. Make it with Empty DA-VAE Latent"
        )
    if shape[1] != spec.channels:
        raise LatentError(
            f"the LATENT has {shape[1]} channels, but the adapted MODEL works on {spec.channels} ({spec.base_channels} "
            f"base + {spec.detail_channels} detail). Make it with Empty DA-VAE Latent or Detail Encode, or turn an "
            "ordinary SD3 latent into one with Base to DA-VAE Latent"
        )
    if not all(shape):
        raise LatentError(f"the LATENT has shape {list(shape)}: there is no picture in it to sample")


def colour_previews(format: comfy.latent_formats.LatentFormat, preview: Sequence[float]) -> None:
    """Give a format the colours of :attr:`LatentSpec.preview`; without any it keeps its own."""
    if preview:
        rows = [list(preview[i : i + 3]) for i in range(0, len(preview), 3)]
        format.latent_rgb_factors, format.latent_rgb_factors_bias = rows[:-1], rows[-1]
        format.taesd_decoder_name = None


def base_colours(spec: LatentSpec) -> comfy.latent_formats.LatentFormat:
    """A format with the preview colours of the base latent: the file's own, else those that ComfyUI knows of the base
    model, else none, for other colours would show another picture."""
    base = bases.base_of_latent(spec.base_channels, spec.base_factor, (spec.base_shift, spec.base_scale))
    known = getattr(comfy.latent_formats, base.comfyui_latents, None) if base else None
    format = known() if known else comfy.latent_formats.LatentFormat()
    colour_previews(format, spec.preview)
    return format


def latent_format(spec: LatentSpec) -> type[comfy.latent_formats.LatentFormat]:
    """A class, because ComfyUI's model configs instantiate theirs without arguments."""

    class DAVAELatentFormat(comfy.latent_formats.SD3):
        """Channels [base, detail]; previews show the base channels."""

        latent_channels = spec.channels
        davae_latent = spec  # by which previews find a tiny decoder
        spacial_downscale_ratio = spec.factor

        def __init__(self) -> None:
            super().__init__()
            base = base_colours(spec)
            self.taesd_decoder_name = None
            self.latent_rgb_factors, self.latent_rgb_factors_bias = (
                base.latent_rgb_factors,
                base.latent_rgb_factors_bias,
            )
            if base.latent_rgb_factors is not None:
                self.latent_rgb_factors = base.latent_rgb_factors + [[0.0, 0.0, 0.0]] * spec.detail_channels

        def process_in(self, latent: torch.Tensor) -> torch.Tensor:
            require_channels(spec, latent.shape)
            return spec.normalise(latent)

        def process_out(self, latent: torch.Tensor) -> torch.Tensor:
            return spec.denormalise(latent)

    return DAVAELatentFormat
