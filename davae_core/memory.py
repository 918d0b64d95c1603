"""What encoding and decoding hold in memory besides the weights, from an autoencoder's widths.

The numbers of activations follow from the layers (see :mod:`.strips` for what strips hold), the factors for what a
strip takes were measured; a test holds both to the bytes that torch allocates. Kernels may take work space of their
own, so callers leave room.
"""

from .attention import ATTENTION_SCORES
from .autoencoder import AutoencoderConfig

MARGIN = 1.1  # for what fragmentation and the kernels themselves take
SCORE_BYTES = 2 * 4  # an attention without a fused kernel holds its scores twice, in float32


def decode_bytes(config: AutoencoderConfig, height: int, width: int, itemsize: int, rows: int | None = None) -> int:
    """Peak bytes of decoding one image.

    Args:
        config: of the base VAE, whose decoder or its trunk is used.
        height, width: of the image, in pixels.
        itemsize: bytes of a number: 4 for float32, 2 for half precision.
        rows: image rows of a strip; None for the whole image at once.
    """
    widths = [*config.widths, config.widths[-1]]
    levels = list(enumerate(zip(widths, widths[1:], strict=False)))  # (level, (its width, that of the level below))
    if rows is None:  # a block's input, its norm and its convolution
        held = max(max(2 * below + own, 3 * own) / 4**i for i, (own, below) in levels)
        held += 2 * config.feature_channels / config.factor**2
        return _peak(config, height, width, itemsize, held)
    held = max([widths[0] + widths[1] / 4] + [(own + below) / 4**i for i, (own, below) in levels[1:]])
    held += config.feature_channels / config.factor**2
    return _peak(
        config, height, width, itemsize, held + _by_precision(itemsize, 4, 6) * widths[1] * min(rows / height, 1)
    )


def encode_bytes(config: AutoencoderConfig, height: int, width: int, itemsize: int, rows: int | None = None) -> int:
    """Peak bytes of encoding one image; arguments as for :func:`decode_bytes`."""
    widths = config.widths
    if rows is None:
        return _peak(config, height, width, itemsize, max(3 * own / 4**i for i, own in enumerate(widths)))
    held = widths[0] + (widths[0] / 4 if len(widths) > 1 else 0)
    held += _by_precision(itemsize, 3, 5) * widths[0] * min(rows / height, 1)
    return _peak(config, height, width, itemsize, held)


def _by_precision(itemsize: int, full: float, half: float) -> float:
    """Half precision is worked on in float32 here and there, which takes twice the room."""
    return full if itemsize >= 4 else half


def _peak(config: AutoencoderConfig, height: int, width: int, itemsize: int, levels: float) -> int:
    """Bytes of the levels, which hold so many numbers per pixel, or of the middle block with its attention."""
    tokens = -(-height // config.factor) * -(-width // config.factor)
    numbers = 8 * itemsize + _by_precision(
        itemsize, 0, 3 * 4
    )  # half precision: queries, keys and values in float32 as well
    middle = numbers * config.feature_channels * tokens + SCORE_BYTES * min(tokens**2, ATTENTION_SCORES)
    return round(MARGIN * max(levels * height * width * itemsize, middle))
