"""Make the reference pictures of the tiny models: ``python -m davae_core.training.tiny.references --data DIR``.

Every captioned image, held-out ones included, average-pooled to half the size that the base model works at, as one
mosaic that ships with the package.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from ... import images
from ...errors import DAVAEError
from ...evaluation.references import PICTURE, References, save_references
from .captions import Captions, load_captions
from .data import ARCHIVES

_LABELS = "labels"


@dataclass(frozen=True)
class ReferencesConfig:
    """Average-pool the captioned images and lay them out in one mosaic."""

    data: Path
    """Folder written by ``python -m davae_core.training.tiny.data``."""
    out: Path = PICTURE
    """PNG to write; a .json of the same name goes beside it."""
    size: int = 0
    """Width and height of a reference in pixels; 0 for a quarter of the images' size, half of the base model's."""


def build(data: Path, captions: Captions, size: int = 0) -> References:
    """The references of prepared data, by style, then in the order of the names.

    Raises:
        DAVAEError: an image is missing, or its size is no multiple of ``size``.
    """
    pooled, texts, held_out = [], [], []
    for style in captions.styles:
        for name in captions.names:
            out = (style, name) in captions.held_out
            path = data / ("held_out" if out else "train") / style / f"{name.replace(' ', '-')}.png"
            if not path.is_file():
                raise DAVAEError(f"{path} is missing; prepare the data: python -m davae_core.training.tiny.data")
            image = images.read_image(path)
            small = size or image.shape[-1] // 4
            if image.shape[1] != image.shape[2] or small < 1 or image.shape[2] % small:
                raise DAVAEError(
                    f"{path} is {image.shape[2]} x {image.shape[1]} px; expected a square whose sides are a multiple "
                    f"of {small} px"
                )
            pooled.append(F.avg_pool2d(image, image.shape[2] // small))
            texts.append(f"{style} {name}")
            held_out.append(out)
    sources = tuple(
        {"style": style, "package": a.package, "version": a.version, "licence": a.licence}
        for style, a in ARCHIVES.items()
        if style != _LABELS
    )
    return References(torch.stack(pooled), tuple(texts), torch.tensor(held_out), sources)


def main() -> None:
    """Run from the command line."""
    config = tyro.cli(ReferencesConfig, description=__doc__)
    try:
        references = build(config.data, load_captions(), config.size)
        save_references(references, config.out)
    except DAVAEError as error:
        raise SystemExit(str(error)) from None
    count, _, size, _ = references.images.shape
    print(f"{config.out}: {count} pictures of {size} px, {config.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
