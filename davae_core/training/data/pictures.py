"""Encoded pictures to pixels: which formats are opened, and why one cannot be.

Every file is opened with the explicit list of formats below, whatever its name ends in: Pillow knows others that start
programs (EPS) or are no photographs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError, features

from ...images import on_white

_AVIF = ("AVIF",) if features.check("avif") else ()
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", *_AVIF)
ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}) | (
    {".avif"} if _AVIF else set()
)
UNCOMPRESSED = ("BMP", "TIFF")  # may be
# What Pillow raises for files that are no images, or damaged ones.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, Image.DecompressionBombError)
ORIENTATION = 0x0112

# How files begin that people take for pictures. HEIC is told by its brand, from byte 4 on.
_STARTS = {
    b"%!PS": "a PostScript (EPS) file",
    b"\xc5\xd0\xd3\xc6": "an EPS file",
    b"%PDF": "a PDF file",
    b"<!doctype html": "a web page, perhaps that of a failed download",
    b"<html": "a web page, perhaps that of a failed download",
    b"<svg": "an SVG drawing",
    b"8bps": "a Photoshop file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
_BRANDS = {b"ftyphei": "a HEIC picture", b"ftypmif1": "a HEIF picture", b"ftypavif": "an AVIF picture"}


def header(file: BinaryIO) -> tuple[str, tuple[int, int]]:
    """The format, and width and height as shown (the EXIF orientation is considered), from the header alone.

    Raises:
        one of UNREADABLE.
    """
    with _image(file) as image:
        _check_mode(image)
        form = image.format or ""
        # The method of PNG files would decode the image, to look for EXIF behind it. Pillow turns TIFF files itself.
        turned = form != "TIFF" and Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
        return form, ((image.height, image.width) if turned else image.size)


def opened(file: BinaryIO, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The picture upright, in RGB, over white where it is transparent; the first one of an animation.

    Args:
        file: the encoded picture.
        at_least: (width, height) that are needed; a JPEG of more than twice that is decoded at a half, a fourth or an
            eighth of its size, which takes that much less memory and time.

    Raises:
        one of UNREADABLE.
    """
    with _image(file) as image:
        _check_mode(image)
        if at_least is not None:
            side = 2 * max(at_least)  # whichever way the picture is turned
            image.draft(None, (side, side))
        return on_white(ImageOps.exif_transpose(image))


def reason(problem: BaseException, start: bytes = b"") -> str:
    """Why a picture cannot be read, in few words.

    Args:
        problem: one of UNREADABLE.
        start: the first bytes of the file.
    """
    if isinstance(problem, Image.DecompressionBombError):
        return f"it has more pixels than Pillow opens ({problem.args[0].split(',')[0]}); make it smaller"
    if isinstance(problem, UnidentifiedImageError):
        if not start:
            return "it is empty"
        text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
        known = next((what for magic, what in _STARTS.items() if text.startswith(magic.lower())), "")
        known = known or next((what for brand, what in _BRANDS.items() if start[4:].startswith(brand)), "")
        return f"it is {known or 'damaged or no picture'}; read are {', '.join(FORMATS)}"
    return str(problem) or type(problem).__name__


@contextmanager
def _image(file: BinaryIO) -> Iterator[Image.Image]:
    """The picture in a file. The decoder of AVIF calls a damaged one a RuntimeError, which other programs' faults are
    too; here it is an OSError, as of other formats."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except RuntimeError as problem:
        raise OSError(str(problem)) from problem


def _check_mode(image: Image.Image) -> None:
    """Raise ValueError for pixels of no known brightness."""
    if image.mode == "F" or image.mode.startswith("I;32") or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"its pixels are numbers of 32 bits (mode {image.mode}); save it with 8 or 16 bits a channel")
