"""The text encoder of the tiny model: learned word embeddings, in place of CLIP-L, CLIP-G and T5."""

import re
from dataclasses import dataclass

import torch
from torch import nn

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """The words of a prompt: runs of letters and digits, lower case."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of the encoder.

    Attributes:
        vocabulary: known words, lower case; word ``i`` has token ``i + 2``.
        length: tokens of a prompt; shorter ones are padded, longer ones cut.
        context: width of the text tokens.
        pooled: width of the pooled vector.
    """

    vocabulary: tuple[str, ...]
    length: int = 8
    context: int = 256
    pooled: int = 256


class TextEncoder(nn.Module):
    """Prompts to what an SD3 model wants: ``context [B, L, context]`` and ``pooled [B, pooled]``."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(len(config.vocabulary) + 2, config.context)
        self.position_embedding = nn.Parameter(torch.zeros(config.length, config.context))
        self.pool = nn.Linear(config.context, config.pooled)
        self._tokens = {word: index + 2 for index, word in enumerate(config.vocabulary)}

    def tokenize(self, text: str) -> list[int]:
        """Tokens of the words of ``text``; unknown words are token 1."""
        return [self._tokens.get(word, UNKNOWN) for word in words(text)]

    def pad(self, tokens: list[int]) -> list[int]:
        """Cut or fill with token 0 to the prompt length."""
        length = self.config.length
        return (tokens + [PAD] * length)[:length]

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode.

        Args:
            tokens: ``[B, L]``, padded.

        Returns:
            ``context [B, L, context]`` and ``pooled [B, pooled]``.
        """
        words = self.token_embedding(tokens)
        present = (tokens != PAD).unsqueeze(-1).to(words.dtype)
        mean = (words * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        return words + self.position_embedding, self.pool(mean)
