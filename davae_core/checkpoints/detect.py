"""Tell from tensor names and shapes what a file is, so that an error can say what was given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .. import bases

FileKind = Literal[
    "autoencoder",
    "adapter",
    "model",
    "predictor",
    "tiny_decoder",
    "few_step_lora",
    "taesd",
    "text_encoder",
    "vae",
    "sd3 model",
    "sd3 checkpoint",
    "diffusers transformer",
    "diffusers vae",
    "authors autoencoder",
    "authors adapter",
    "unet",
    "lora",
    "unknown",
]
CHECKPOINT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
VAE_PREFIXES = ("first_stage_model.", "vae.")  # in whole checkpoints: of Stable Diffusion, and of FLUX.1 and its kin


@dataclass(frozen=True)
class Detected:
    """A kind of file, and a phrase for people."""

    kind: FileKind
    description: str


def detect(shapes: Mapping[str, Any], kind: str | None = None) -> Detected:
    """Look at a file's names and shapes.

    Args:
        shapes: shape (a tuple, or a tensor) by tensor name.
        kind: what the file's metadata says it is; settles what shapes leave open.
    """
    names = set(shapes)

    def side(name: str, dimension: int) -> int:
        shape = tuple(getattr(shapes[name], "shape", shapes[name])) if name in names else ()
        return shape[dimension] if len(shape) > dimension else 0

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if "detail_down.conv.weight" in names and any_starts("base_encoder."):
        return Detected("autoencoder", "a DA-VAE autoencoder")
    if any_starts("davae.x_embedder."):
        return Detected("adapter", "a DA-VAE adapter")
    if {"conv_in.weight", "conv_out.weight", "norm_out.weight", "blocks.0.conv1.weight"} <= names:
        return Detected("predictor", "a DA-VAE detail predictor")
    if {"1.weight", "3.conv.0.weight", "3.conv.4.weight", "7.weight"} <= names and "7.bias" not in names:
        if kind == "tiny_decoder" or "22.weight" in names:  # four enlargements: TAESD's latents have three
            return Detected("tiny_decoder", "a tiny decoder of DA-VAE latents")
        channels = side("1.weight", 1)
        return Detected("taesd", f"a TAESD decoder of ordinary latents with {channels} channels (no detail)")
    if {"token_embedding.weight", "position_embedding", "pool.weight"} <= names:
        return Detected("text_encoder", "the text encoder of the tiny model")
    if {"dc_down.conv.weight", "dc_up.conv.weight"} <= names and any_starts("vae.encoder.down_blocks."):
        return Detected("authors autoencoder", "the autoencoder of the authors' SD3 release")
    if any_starts("tokenizer_patch_embed.") and any_starts("project_out."):
        return Detected("authors adapter", "embedder and head of the authors' SD3 release")
    if "transformer_blocks.0.attn.add_q_proj.weight" in names and "pos_embed.proj.weight" in names:
        channels = side("pos_embed.proj.weight", 1)
        return Detected("diffusers transformer", f"diffusers' SD3 transformer with {channels} channels")
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in names and "decoder.conv_in.weight" in names:
        channels = side("decoder.conv_in.weight", 1)
        return Detected("diffusers vae", f"diffusers' AutoencoderKL with {channels} latent channels (no detail branch)")
    for prefix in ("", *CHECKPOINT_PREFIXES):
        if f"{prefix}{bases.MMDIT.mark}" in names:
            embedder = f"{prefix}{bases.MMDIT.embedder}weight"
            channels = side(embedder, 1)
            if kind == "model" or channels > bases.SD3.latent_channels:
                return Detected("model", f"an SD3.5 diffusion model with {channels} channels (a merged DA-VAE model)")
            if any_starts("first_stage_model.", "text_encoders."):
                return Detected("sd3 checkpoint", "a whole SD3 / SD3.5 checkpoint")
            return Detected("sd3 model", f"an unadapted SD3 / SD3.5 diffusion model with {channels} channels")
    for prefix in ("", *VAE_PREFIXES):
        if f"{prefix}decoder.conv_in.weight" in names and f"{prefix}encoder.conv_in.weight" in names:
            channels = side(f"{prefix}decoder.conv_in.weight", 1)
            quant = f"{prefix}quant_conv.weight" in names
            like = [b.title for b in bases.BASES.values() if (b.latent_channels, b.quant_conv) == (channels, quant)]
            told = f", like {' or '.join(like)}'s (no detail branch)" if like else ""
            what = "a checkpoint with a VAE of" if prefix == VAE_PREFIXES[1] else "a plain VAE with"
            return Detected("vae", f"{what} {channels} latent channels{told}")
    if any_starts("model.diffusion_model.input_blocks.", "input_blocks."):
        return Detected("unet", "a Stable Diffusion 1 / 2 / XL model")
    if any(
        name.endswith((".lora_A.weight", ".lora_down.weight", ".lora_B.weight", ".lora_up.weight")) for name in names
    ):
        if kind == "few_step_lora":
            return Detected("few_step_lora", "a few-step LoRA for an adapted model")
        return Detected("lora", "a LoRA (without the DA-VAE embedder and head)")
    return Detected("unknown", f"a file of {len(names)} tensors that is none of the known kinds")
