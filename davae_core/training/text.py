"""Captions on their way to the model: the vocabulary, dropout of prompts and words, and what they become."""

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from .. import checkpoints
from ..errors import DAVAEError
from ..evaluation import generate
from ..text_encoder import TextEncoder, words
from .draws import Draws

Encoded = tuple[torch.Tensor, torch.Tensor]


class Embeddings(Protocol):
    """Embeddings that were computed before the training, by caption; the empty caption is among them."""

    def __call__(self, captions: list[str]) -> Encoded:
        """``context [B, L, context]`` and ``pooled [B, pooled]`` of B captions."""


def source(text_encoder: Path | None, embeddings: Path | None) -> TextEncoder | Embeddings:
    """What captions are encoded by: exactly one of the two is given.

    Args:
        text_encoder: file of the tiny model's text encoder.
        embeddings: folder of shards written by ``python -m davae_core.training.text``.

    Raises:
        DAVAEError: none or both are given, or embeddings cannot be read.
    """
    if (text_encoder is None) == (embeddings is None):
        raise DAVAEError(
            "captions need a text encoder or their embeddings: give one of --text-encoder (the tiny model's file) and "
            f"--embeddings (a folder of shards), got {text_encoder} and {embeddings}"
        )
    if text_encoder is not None:
        return checkpoints.load_text_encoder(text_encoder).float().requires_grad_(False)
    try:
        reader = importlib.import_module(".embeddings", __package__)
    except ModuleNotFoundError as missing:
        raise DAVAEError(
            f"embeddings are read by davae_core.training.embeddings, and {missing.name} is not installed here; use an "
            "installation of the whole repository"
        ) from missing
    found: Embeddings = reader.load_embeddings(embeddings)
    return found


def encode(text: TextEncoder | Embeddings, captions: list[str], device: torch.device) -> Encoded:
    """``context [B, L, context]`` and ``pooled [B, pooled]``, float32, on the device."""
    if isinstance(text, TextEncoder):
        return generate.encode_captions(text, captions)
    context, pooled = text(captions)
    return context.to(device, torch.float32), pooled.to(device, torch.float32)


def vocabulary(captions: Iterable[str]) -> tuple[str, ...]:
    """All words of the captions, sorted."""
    return tuple(sorted({word for caption in captions for word in words(caption)}))


def thinned(captions: Sequence[str], draws: Draws, prompt_dropout: float, word_dropout: float) -> list[str]:
    """The captions without the prompts, and in the others without the words, that these draws leave out.

    Args:
        captions: of the batch that ``draws`` are for.
        draws: of the step.
        prompt_dropout: share of prompts that become the empty one.
        word_dropout: share of words left out of the other prompts.
    """
    gone = (draws.uniform("prompt") < prompt_dropout).tolist()
    texts = ["" if out else caption for caption, out in zip(captions, gone, strict=True)]
    if not word_dropout:
        return texts
    split = [text.split() for text in texts]
    kept = (draws.uniform("word", max(map(len, split))) >= word_dropout).tolist()
    return [" ".join(word for word, keep in zip(*row, strict=False) if keep) for row in zip(split, kept, strict=True)]
