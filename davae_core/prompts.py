"""What captions become: by the tiny model's text encoder, or out of embeddings that lie ready."""

from collections.abc import Sequence
from pathlib import Path

import torch

from . import checkpoints
from .embeddings import Embeddings, Encoded, load_embeddings
from .errors import DAVAEError
from .sampling import encode_captions
from .text_encoder import TextEncoder


def source(text_encoder: Path | None, embeddings: Path | None) -> TextEncoder | Embeddings:
    """What captions are encoded by: exactly one of the two is given.

    Args:
        text_encoder: file of the tiny model's text encoder.
        embeddings: folder of shards written by ``python -m davae_core.training text``.

    Raises:
        DAVAEError: none or both are given, or what is given cannot be read.
    """
    if text_encoder is not None and embeddings is None:
        return checkpoints.load_text_encoder(text_encoder).float().requires_grad_(False)
    if embeddings is not None and text_encoder is None:
        return load_embeddings(embeddings)
    raise DAVAEError(
        "captions need a text encoder or their embeddings: give one of --text-encoder (the tiny model's file) and "
        f"--embeddings (a folder of shards), got {text_encoder} and {embeddings}"
    )


def encode(text: TextEncoder | Embeddings, captions: Sequence[str], device: torch.device) -> Encoded:
    """Captions as the model reads them, float32, on the device.

    Raises:
        DAVAEError: a caption has no embedding.
    """
    if isinstance(text, TextEncoder):
        return Encoded(*encode_captions(text, captions))
    context, pooled, present = text(captions)
    return Encoded(
        context.to(device, torch.float32),
        pooled.to(device, torch.float32),
        None if present is None else present.to(device),
    )
