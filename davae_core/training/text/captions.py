"""Captions on their way to the text encoder: the vocabulary, and dropout of prompts and words."""

from collections.abc import Iterable, Sequence

from ...text_encoder import words
from ..data.draws import Draws


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
