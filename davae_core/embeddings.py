"""Text embeddings that were computed once, for trainings without a text encoder on the device.

Written by ``python -m davae_core.training text``; read here, memory-mapped.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .errors import DAVAEError
from .records import RecordSet

KIND, MAKER = "text_embeddings", "python -m davae_core.training text"
PARTS = ("clip", "t5", "pooled")


def key_of(caption: str) -> str:
    """The name of a caption's record."""
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def context_of(clip: torch.Tensor, t5: torch.Tensor, width: int) -> torch.Tensor:
    """CLIP's tokens, zeros added up to T5's width, then T5's: ``[L1, w]``, ``[L2, width]`` to ``[L1 + L2, width]``."""
    return torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5])


def present(lengths: Sequence[int]) -> torch.Tensor | None:
    """Which tokens of captions that are filled up to the longest are there, ``[B, L]`` bool; None where all are."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


class Encoded(NamedTuple):
    """B captions, as an SD3 model reads them.

    Attributes:
        context: ``[B, L, width]``.
        pooled: ``[B, width]``.
        present: ``[B, L]`` bool, which tokens are there; None: all.
    """

    context: torch.Tensor
    pooled: torch.Tensor
    present: torch.Tensor | None = None


class Embeddings:
    """Captions to what an SD3 model reads.

    Args:
        shards: of text embeddings.
    """

    def __init__(self, shards: RecordSet) -> None:
        self.shards = shards
        self.context = int(shards.about["context"])
        """Width of the text tokens."""
        self.pooled = int(shards.about["pooled"])
        """Width of the pooled vector."""

    def __len__(self) -> int:
        return len(self.shards)

    def __call__(self, captions: Sequence[str]) -> Encoded:
        """``context [B, L, context]``, ``pooled [B, pooled]`` and ``present [B, L]`` of B captions, on the CPU.

        L is 77 for each chunk of 75 CLIP tokens and the number of T5's tokens, at least 77: 154 for most captions.
        Where the captions of a batch differ in length, the shorter ones are filled up with zeros at the end, which a
        model has to leave out: ``present`` tells which tokens are there. It is None where all are.

        Raises:
            DAVAEError: a caption was not encoded.
        """
        records = [self.shards.get(self._key(caption), PARTS) for caption in captions]
        contexts = [context_of(clip.float(), t5.float(), self.context) for clip, t5, _ in records]
        pooled = torch.stack([pooled.float() for _, _, pooled in records])
        there = present([len(context) for context in contexts])
        return Encoded(torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True), pooled, there)

    def _key(self, caption: str) -> str:
        key = key_of(caption)
        if key not in self.shards:
            shown = caption if len(caption) <= 200 else f"{caption[:200]}..."
            raise DAVAEError(
                f"{self.shards.folder} has no embedding of the caption {shown!r}; run {MAKER} again with the images of "
                "this training: it adds what is missing"
            )
        return key


def load_embeddings(folder: Path) -> Embeddings:
    """Open a finished set of text embeddings.

    Raises:
        DAVAEError: it is not finished or damaged, or lacks the empty prompt.
    """
    embeddings = Embeddings(RecordSet(folder, KIND, MAKER))
    embeddings._key("")
    return embeddings
