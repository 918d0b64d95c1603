"""The small pictures that generated images are compared with: one for each caption of the tiny models.

They ship as one mosaic, so that measuring recall needs no download. ``python -m davae_core.training.tiny.references``
makes them from the prepared data.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import atomic, images
from ..checkpoints import foreign_json
from ..checkpoints.settings import Number
from ..errors import DAVAEError

PICTURE = Path(__file__).with_name("tiny_references.png")
DESCRIPTION = PICTURE.with_suffix(".json")
COLUMNS = 50
SIDE = Number(1, 4096, whole=True)  # of a picture, and of the mosaic


@dataclass(frozen=True)
class References:
    """One picture per caption ``"<style> <name>"``.

    Attributes:
        images: ``[N, 3, h, h]`` in [-1, 1], average-pooled.
        captions: N of them, all different.
        held_out: ``[N]`` bool; nothing was trained on these.
        sources: what the pictures were made from, and under which licences.
    """

    images: torch.Tensor
    captions: tuple[str, ...]
    held_out: torch.Tensor
    sources: tuple[dict[str, str], ...] = ()

    def __post_init__(self) -> None:
        count = len(self.captions)
        if self.images.shape[:2] != (count, 3) or self.held_out.shape != (count,) or len(set(self.captions)) != count:
            raise DAVAEError(
                f"{count} reference captions ({len(set(self.captions))} different ones) do not fit images of shape "
                f"{list(self.images.shape)} and {self.held_out.numel()} held-out marks; make the references again"
            )

    @property
    def training(self) -> list[int]:
        """Indices of the captions that were trained on, in order."""
        return (~self.held_out).nonzero().flatten().tolist()

    @property
    def held_out_indices(self) -> list[int]:
        """Indices of the held-out captions, in order."""
        return self.held_out.nonzero().flatten().tolist()

    @property
    def styles(self) -> tuple[str, ...]:
        """Every style, in the order of first appearance."""
        return tuple(dict.fromkeys(split(caption)[0] for caption in self.captions))


def split(caption: str) -> tuple[str, str]:
    """``"3d red heart"`` to ``("3d", "red heart")``."""
    style, _, name = caption.partition(" ")
    return style, name


def load_references(picture: Path = PICTURE) -> References:
    """Read a mosaic and the ``.json`` of the same name beside it.

    Raises:
        DAVAEError: a file is missing or damaged, or the two do not fit.
    """
    description = picture.with_suffix(".json")
    again = "make both again: python -m davae_core.training.tiny.references --data DIR"
    try:
        told = foreign_json.read(description)
        captions = tuple(told["captions"])
        size, columns = (SIDE.read(name, told[name]) for name in ("size", "columns"))
        held_out = set(told["held_out"])
        sources = tuple(dict(source) for source in told["sources"])
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise DAVAEError("captions are no list of texts")
    except (ValueError, KeyError, TypeError) as problem:
        raise DAVAEError(f"{description} cannot be read ({type(problem).__name__}: {problem}); {again}") from problem
    if not held_out <= set(captions):
        raise DAVAEError(f"{description} holds out captions that it does not list; {again}")
    whole = images.read_image(picture)
    expected = (-(-len(captions) // columns) * size, columns * size)
    if whole.shape[1:] != expected:
        raise DAVAEError(
            f"{picture} is {whole.shape[2]} x {whole.shape[1]} px, expected {expected[1]} x {expected[0]} for "
            f"{len(captions)} pictures of {size} px; {again}"
        )
    marks = torch.tensor([caption in held_out for caption in captions])
    return References(images.parts(whole, size)[: len(captions)].contiguous(), captions, marks, sources)


def save_references(references: References, picture: Path = PICTURE, columns: int = COLUMNS) -> None:
    """Write the mosaic as PNG and its description beside it; the pictures are rounded to 8 bits.

    Raises:
        DAVAEError: a file cannot be written.
    """
    told = {
        "size": references.images.shape[-1],
        "columns": columns,
        "sources": list(references.sources),
        "captions": list(references.captions),
        "held_out": [references.captions[i] for i in references.held_out_indices],
    }
    images.save_image(picture, images.mosaic(references.images, columns))
    atomic.write(picture.with_suffix(".json"), (json.dumps(told, indent=1) + "\n").encode())
