"""Tiny decoders of models/vae_approx: which there are, which fits a latent, and decoding with one."""

import logging
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch

from ...davae_core import checkpoints
from ...davae_core.errors import DAVAEError
from ...davae_core.latent import LatentSpec
from ...davae_core.tiny_decoder import TinyDecoder, decode_bytes, mismatch
from .autoencoder import AutoencoderHandle, check_interrupt
from .folders import file_names, file_stamp, require_file
from .history import note_decoded
from .memory import Way, Ways
from .vae import to_unit_range
from .versions import intermediate_dtype

FOLDER = "vae_approx"
STRIPS = (512, 64)  # rows of an image that are decoded at once where memory is short

_latents: dict[str, LatentSpec | None] = {}  # what a file decodes, by its stamp; None of other files
_kept: dict[str, TinyDecoder] = {}  # the last one that previewed, by the stamp of its file


def decoder_names() -> list[str]:
    """The tiny decoders in models/vae_approx. Other files there are decoders of other models' latents."""
    return [name for name in file_names(FOLDER) if _latent(name) is not None]


def fitting(spec: LatentSpec) -> str | None:
    """The first tiny decoder there is for latents of a DA-VAE."""
    for name in decoder_names():
        latent = _latent(name)
        if latent is not None and not mismatch(latent, spec):
            return name
    return None


def _latent(name: str) -> LatentSpec | None:
    """What a file decodes, by its header alone; None where it is no tiny decoder of ours, or is damaged."""
    if Path(name).suffix.lower() not in (".safetensors", ".sft"):
        return None
    stamp = file_stamp(FOLDER, name)
    if stamp not in _latents:
        path = folder_paths.get_full_path(FOLDER, name)
        try:
            _latents[stamp] = checkpoints.tiny_decoder_config(path).latent if path else None
        except (DAVAEError, OSError) as problem:
            logging.debug("DA-VAE: %s is no tiny decoder (%s)", name, problem)
            _latents[stamp] = None
    return _latents[stamp]


def load(name: str) -> TinyDecoder:
    """A tiny decoder of models/vae_approx, on the CPU, in the precision that ComfyUI chooses for VAEs.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is of another kind.
    """
    management = comfy.model_management
    dtype = management.vae_dtype(management.vae_device(), [torch.bfloat16, torch.float32])
    return checkpoints.load_tiny_decoder(require_file(FOLDER, name), dtype).requires_grad_(False)


def kept(name: str) -> TinyDecoder:
    """:func:`load`, the same object as the last time for the same file; on whatever device it was left."""
    stamp = file_stamp(FOLDER, name)
    if stamp not in _kept:
        _kept.clear()
        _kept[stamp] = load(name)
    return _kept[stamp]


def decode_fast(name: str, davae: AutoencoderHandle, z: torch.Tensor, detail_strength: float) -> torch.Tensor:
    """What :meth:`AutoencoderHandle.decode` gives, nearly, by a tiny decoder of models/vae_approx.

    Args:
        name: its file.
        davae: the DA-VAE that the latent is of.
        z: ``[B, C + D, h, w]``.
        detail_strength: factor on the detail channels.

    Raises:
        CheckpointError: see :func:`load`.
        DAVAEError: the decoder is of another DA-VAE.
    """
    note_decoded(z, davae.model, davae.name)
    model, management = load(name), comfy.model_management
    if words := mismatch(model.latent, davae.latent):
        raise DAVAEError(
            f"{name} {words}: the DA-VAE that is connected is {davae.name}. Choose a tiny decoder that was trained for "
            'it, or "full"'
        )
    offload = management.vae_offload_device()
    device, dtype = management.vae_device(), model[1].weight.dtype
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    factor = model.latent.factor
    need = partial(decode_bytes, model.config, z.shape[2] * factor, z.shape[3] * factor, dtype.itemsize)
    tiled = partial(model.decode_tiled, on_strip=check_interrupt)
    strips = [Way(f"in strips of {rows} rows", need(rows), partial(tiled, rows=rows)) for rows in STRIPS]
    ways = Ways(patcher, [Way("on the whole image", need(), model.decode), *strips])
    management.load_models_gpu([patcher], memory_required=ways.need(), force_full_load=True)
    images = []
    for part in z.split(1):
        check_interrupt()
        picture = ways(part.to(device, dtype), detail_strength)
        images.append(picture.to(management.intermediate_device(), intermediate_dtype()))
    return to_unit_range(torch.cat(images)).movedim(1, -1)
