"""Stage 1 on the VAE of FLUX.1, which Z-Image, Lumina 2, Chroma and HiDream-I1 use in the same units: f8c16 to f16c32.

Nobody has published a DA-VAE on it. The VAE has the shapes of SD3's, so the numbers are those of ``sd3_vae``; what
differs is the units of the base latent, which ``family`` decides: (z - 0.1159) * 0.3611.
"""

from dataclasses import replace
from pathlib import Path

from .sd3_vae import SD3_PREDICTOR, SD3_TINY_DECODER, SD3_VAE_F16, SD3_VAE_F16_ROBUST

FLUX_VAE_F16 = replace(
    SD3_VAE_F16,
    run=replace(SD3_VAE_F16.run, out=Path("output/flux_vae_f16")),
    family="flux1",
    file="flux_davae.safetensors",
)
FLUX_VAE_F16_ROBUST = replace(
    SD3_VAE_F16_ROBUST,
    run=replace(SD3_VAE_F16_ROBUST.run, out=Path("output/flux_vae_f16_robust")),
    family=FLUX_VAE_F16.family,
    file=FLUX_VAE_F16.file,
)
FLUX_PREDICTOR = replace(
    SD3_PREDICTOR,
    run=replace(SD3_PREDICTOR.run, out=Path("output/flux_predictor")),
    family=FLUX_VAE_F16.family,
    file="flux_predictor.safetensors",
)
FLUX_TINY_DECODER = replace(
    SD3_TINY_DECODER,
    run=replace(SD3_TINY_DECODER.run, out=Path("output/flux_tiny_decoder")),
    family=FLUX_VAE_F16.family,
    file="flux_tiny_decoder.safetensors",
)

AUTOENCODER = {
    "flux_vae_f16": ("FLUX.1's VAE to f16c32, 1024 px crops, batch 128", FLUX_VAE_F16),
    "flux_vae_f16_robust": ("its decoder trained on, so that it bears what a sampler gets wrong", FLUX_VAE_F16_ROBUST),
}
PREDICTOR = {
    "flux_predictor": ("the detail of flux_vae_f16 from FLUX.1's latents, 1024 px crops, batch 32", FLUX_PREDICTOR)
}
TINY_DECODER = {
    "flux_tiny_decoder": (
        "a small fast decoder for the latents of flux_vae_f16, 1024 px crops, batch 32",
        FLUX_TINY_DECODER,
    )
}
