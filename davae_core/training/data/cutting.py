"""The shapes that images are cut to, and the cutting."""

import math
from collections.abc import Sequence

from PIL import Image

from ...errors import DAVAEError

RATIO = 2.0
ENLARGED = 1.01  # an enlargement up to this one cannot be seen


def shapes(size: int, multiple: int, buckets: bool) -> list[tuple[int, int]]:
    """The (width, height) that images are cut to.

    Args:
        size: side of the square, or with buckets the root of the largest area.
        multiple: all sides are multiples of it.
        buckets: shapes from 1:2 to 2:1, among them a square; else the square alone.

    Raises:
        DAVAEError: the size is no multiple, or with buckets below the smallest.
    """
    if not buckets:
        if size % multiple:
            below = size // multiple * multiple
            near = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise DAVAEError(
                f"the size {size} is not a multiple of {multiple}; use {near} (--data.size, or size= of a folder)"
            )
        return [(size, size)]
    side = size // multiple * multiple
    if not side:
        raise DAVAEError(
            f"the size {size} is below {multiple}, the smallest side there is (--data.size, or size= of a folder)"
        )
    found = {(side, side)}
    for short in range(multiple, side + 1, multiple):
        long = size**2 // short // multiple * multiple
        if long <= RATIO * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_shape(size: tuple[int, int], among: Sequence[tuple[int, int]]) -> int:
    """Index of the shape whose aspect ratio is nearest to that of ``size``, both (width, height)."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(among)), key=lambda i: (abs(math.log(among[i][0] / among[i][1]) - ratio), i))


def covering(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) with the ratio of ``size`` that covers ``shape``, to a pixel."""
    scale = max(shape[0] / size[0], shape[1] / size[1])
    return max(shape[0], round(size[0] * scale)), max(shape[1], round(size[1] * scale))


def is_enlarged(size: tuple[int, int], shape: tuple[int, int]) -> bool:
    """Whether a picture of ``size`` has fewer pixels than ``shape`` takes, both (width, height)."""
    return max(shape[0] / size[0], shape[1] / size[1]) > ENLARGED


def shrunk(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """A picture that is larger than it takes to cover ``shape`` shrunk to that; any other as it is."""
    size = covering(image.size, shape)
    return image.resize(size, Image.Resampling.LANCZOS) if size[0] < image.width else image


def crop(image: Image.Image, shape: tuple[int, int], x: int, y: int) -> Image.Image:
    """The part of ``shape`` at (x, y) of the picture scaled to cover that shape.

    Only this part is enlarged, so that the cost is that of the shape, however long a picture is.
    """
    size = covering(image.size, shape)
    if size == image.size:
        return image.crop((x, y, x + shape[0], y + shape[1]))
    across, down = image.width / size[0], image.height / size[1]
    box = (x * across, y * down, min((x + shape[0]) * across, image.width), min((y + shape[1]) * down, image.height))
    return image.resize(shape, Image.Resampling.LANCZOS if across > 1 else Image.Resampling.BICUBIC, box)
