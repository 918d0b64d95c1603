"""The latent format that tells ComfyUI how our latents are scaled and previewed."""

import comfy.latent_formats
import torch

from ...davae_core.latent import LatentSpec


def latent_format(spec: LatentSpec) -> type[comfy.latent_formats.LatentFormat]:
    """A class, because ComfyUI's model configs instantiate theirs without arguments."""

    class DAVAELatentFormat(comfy.latent_formats.SD3):
        """Channels [base, detail]; previews show the base channels, with SD3's colours."""

        latent_channels = spec.channels
        spacial_downscale_ratio = spec.factor

        def __init__(self) -> None:
            super().__init__()
            self.taesd_decoder_name = None
            base = self.latent_rgb_factors[: spec.base_channels]
            self.latent_rgb_factors = base + [[0.0, 0.0, 0.0]] * (spec.channels - len(base))

        def process_in(self, latent: torch.Tensor) -> torch.Tensor:
            return spec.normalise(latent)

        def process_out(self, latent: torch.Tensor) -> torch.Tensor:
            return spec.denormalise(latent)

    return DAVAELatentFormat
