"""Captions to tokens, as ComfyUI's SD3 tokenizers make them of plain text (``comfy/sd1_clip.py``, ``sd3_clip.py``).

CLIP reads chunks of 77 tokens: a start token, up to 75 of the text, an end token, padding (CLIP-L: end tokens; CLIP-G:
zeros). T5 reads one sequence that ends in its end token and is padded with zeros to at least 77; it is never cut.

A caption is plain text. ComfyUI reads parentheses as weights, ``(word:1.2)``, unless they are escaped, and
``embedding:name`` as a textual inversion; here both are what they say. So a caption becomes what ComfyUI makes of
:func:`as_prompt` of it. The tokenizers' own files are in every ComfyUI and in every diffusers folder of SD3; nothing is
downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5TokenizerFast  # type: ignore[attr-defined]

from ...errors import DAVAEError

CLIP_LENGTH, T5_LENGTH = 77, 77
PAD = 0
# Where CLIP's and T5's tokenizer lie in a ComfyUI and in a diffusers folder.
PLACES = (
    (Path("comfy/sd1_tokenizer"), Path("comfy/text_encoders/t5_tokenizer")),
    (Path("tokenizer"), Path("tokenizer_3")),
)


@dataclass(frozen=True)
class Tokens:
    """A caption for the three encoders."""

    clip_l: tuple[tuple[int, ...], ...]
    """Chunks of 77."""
    clip_g: tuple[tuple[int, ...], ...]
    """Chunks of 77."""
    t5: tuple[int, ...]
    """At least 77; none without T5."""


def as_prompt(caption: str) -> str:
    """The text that ComfyUI's CLIPTextEncode reads as ``caption``: parentheses are escaped."""
    return caption.replace("(", "\\(").replace(")", "\\)")


def chunks(ids: Sequence[int], start: int, end: int, pad: int) -> tuple[tuple[int, ...], ...]:
    """CLIP tokens of a text of any length in chunks of 77; at least one."""
    inside = CLIP_LENGTH - 2
    parts = [list(ids[i : i + inside]) for i in range(0, max(1, len(ids)), inside)]
    return tuple((start, *part, end, *[pad] * (inside - len(part))) for part in parts)


class Tokenizers:
    """CLIP's tokenizer, which CLIP-L and CLIP-G share, and T5's.

    Args:
        folder: a ComfyUI folder, or a diffusers folder with ``tokenizer`` and ``tokenizer_3``.
        t5: whether T5 is used.

    Raises:
        DAVAEError: the tokenizers are not there.
    """

    def __init__(self, folder: Path, t5: bool = True) -> None:
        clip_folder, t5_folder = _places(folder, t5)
        self.clip: PreTrainedTokenizerBase = CLIPTokenizer.from_pretrained(str(clip_folder), local_files_only=True)
        self.t5: PreTrainedTokenizerBase | None = None
        if t5:
            self.t5 = T5TokenizerFast.from_pretrained(str(t5_folder), local_files_only=True)
        self.start, self.end = _ids(self.clip, "")

    def __call__(self, caption: str) -> Tokens:
        """Tokens of a caption, read literally."""
        ids = _ids(self.clip, caption)[1:-1]
        t5: tuple[int, ...] = ()
        if self.t5 is not None:
            read = _ids(self.t5, caption)
            t5 = (*read, *[PAD] * (T5_LENGTH - len(read)))
        return Tokens(chunks(ids, self.start, self.end, self.end), chunks(ids, self.start, self.end, PAD), t5)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens with the special ones; texts of any length, without a warning."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def _places(folder: Path, t5: bool) -> tuple[Path, Path]:
    """Folders of the two tokenizers."""
    for places in PLACES:
        clip, other = (folder / place for place in places)
        if (clip / "vocab.json").is_file() and (not t5 or _holds_t5(other)):
            return clip, other
    wanted = " or ".join(f"{clip}{f' and {other}' if t5 else ''}" for clip, other in PLACES)
    raise DAVAEError(
        f"{folder} holds no tokenizers: expected {wanted} in it. Give the folder of a ComfyUI, or of SD3 / SD3.5 in "
        "diffusers' layout (--tokenizers)"
    )


def _holds_t5(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model"))
