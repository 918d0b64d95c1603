"""Captions to what the diffusion model reads, with prompt dropout."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..text_encoder import TextEncoder, words


def vocabulary(captions: Iterable[str]) -> tuple[str, ...]:
    """All words of the captions, sorted."""
    return tuple(sorted({word for caption in captions for word in words(caption)}))


class Condition(nn.Module):
    """Captions to text tokens and pooled vectors, through the tiny models' text encoder."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, captions: Sequence[str], dropped: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode.

        Args:
            captions: B of them.
            dropped: ``[B]``; where true, the prompt is the empty one.

        Returns:
            ``context [B, L, context]`` and ``pooled [B, pooled]``.
        """
        texts = ["" if dropped is not None and bool(dropped[i]) else caption for i, caption in enumerate(captions)]
        tokens = torch.tensor([self.encoder.pad(self.encoder.tokenize(text)) for text in texts])
        return self.encoder(tokens.to(self.encoder.token_embedding.weight.device))
