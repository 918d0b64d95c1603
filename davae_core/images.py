"""Image files to tensors ``[3, H, W]`` in [-1, 1] and back, and contact sheets."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from . import atomic
from .errors import DAVAEError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_QUALITY = 90
_BORDER = 2


def find_images(folder: Path) -> list[Path]:
    """All image files in a folder and below it, sorted.

    Raises:
        DAVAEError: it is no folder, or holds no images.
    """
    if not folder.is_dir():
        raise DAVAEError(f"{folder} is not a folder; give a folder of images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DAVAEError(f"{folder} holds no images ({', '.join(SUFFIXES)}); give a folder that does")
    return found


def read_image(path: Path) -> torch.Tensor:
    """An image ``[3, H, W]`` in [-1, 1], turned as its EXIF says; what is transparent is put on white.

    Raises:
        DAVAEError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = on_white(ImageOps.exif_transpose(file))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise DAVAEError(f"{path} is not a readable image ({problem}); remove it or save it again") from problem
    return from_bytes(np.array(picture))


def on_white(image: Image.Image) -> Image.Image:
    """RGB; transparent parts are laid over white, 16-bit greys are scaled to 8 bits."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def from_bytes(pixels: np.ndarray) -> torch.Tensor:
    """``[H, W, 3]`` uint8 to ``[3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def to_bytes(image: torch.Tensor) -> np.ndarray:
    """``[3, H, W]`` in [-1, 1] to ``[H, W, 3]`` uint8; what lies outside is clamped."""
    scaled = (image.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def save_image(path: Path, image: torch.Tensor) -> None:
    """Write ``[3, H, W]`` in [-1, 1], as a JPEG where the name ends so, else as a PNG; whole or not at all.

    Raises:
        DAVAEError: it cannot be written.
    """
    data = io.BytesIO()
    picture = Image.fromarray(to_bytes(image))
    if path.suffix.lower() in (".jpg", ".jpeg"):
        picture.save(data, "JPEG", quality=_QUALITY, subsampling=0)
    else:
        picture.save(data, "PNG", optimize=True)
    atomic.write(path, data.getvalue())


def mosaic(images: torch.Tensor, columns: int) -> torch.Tensor:
    """``[N, 3, h, w]`` to one picture ``[3, rows h, columns w]``, row by row; empty places are white."""
    missing = -len(images) % columns
    if missing:
        images = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    rows = images.unflatten(0, (-1, columns))  # [rows, columns, 3, h, w]
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def tile(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of images ``[N, 3, h, w]``, all of one size and count, to one picture ``[3, rows h, N w]``."""
    return torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)


def parts(picture: torch.Tensor, size: int) -> torch.Tensor:
    """Undo :func:`mosaic` for square images: ``[3, H, W]`` to ``[N, 3, size, size]``, empty places included."""
    tiles = picture.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [3, rows, size, columns, size]
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)


def contact_sheet(rows: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """Stack what belongs together, then lay the stacks side by side.

    Args:
        rows: ``[N, 3, h, w]`` each, in [-1, 1]; image i of every entry goes into stack i, first entry on top. Smaller
            ones are enlarged to the size of the largest, pixel by pixel.
        columns: stacks per line.
    """
    height = max(row.shape[2] for row in rows)
    width = max(row.shape[3] for row in rows)
    large = [F.interpolate(row.float().cpu(), size=(height, width), mode="nearest-exact") for row in rows]
    return mosaic(torch.cat(large, dim=2), min(columns, len(large[0])))


def framed(images: torch.Tensor, good: Iterable[bool]) -> torch.Tensor:
    """A green frame around the good ones, a red one around the others; ``[N, 3, h, w]``, a copy."""
    colours = torch.stack([torch.tensor([-0.6, 0.3, -0.6] if ok else [0.8, -0.8, -0.8]) for ok in good])
    out = colours[:, :, None, None].expand(images.shape).to(images).clone()
    inside = (slice(None), slice(None), slice(_BORDER, -_BORDER), slice(_BORDER, -_BORDER))
    out[inside] = images[inside]
    return out
