"""A font that has the letters of a text, among those of this machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PLACES = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts",
    "/System/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
# Parts of the file names of fonts with many letters, Chinese, Japanese and Korean among them.
MANY_LETTERS = (
    "cjk", "notosanssc", "notosansjp", "notosanstc", "notosanskr", "sourcehan", "wqy", "droidsansfallback", "pingfang",
    "hiragino", "msyh", "simhei", "simsun", "yugoth", "meiryo", "malgun", "arialunicode", "arial unicode", "unifont",
    "dejavusans.ttf",
)  # fmt: skip
MISSING = "\U0010fffd"  # a letter that no font has


def shows(font: Font, text: str) -> bool:
    """Whether a font has every letter of a text; what it has not, it draws as a box."""
    box = bytes(font.getmask(MISSING))
    return all(letter.isspace() or bytes(font.getmask(letter)) != box for letter in set(text))


def font_for(text: str, size: int) -> Font | None:
    """Pillow's own font where it has the letters, else the first of this machine that has; None where none has."""
    own = ImageFont.load_default(size)
    if shows(own, text):
        return own
    for path in candidates():
        try:
            font = ImageFont.truetype(path, size)
        except OSError:
            continue
        if shows(font, text):
            return font
    return None


@functools.cache
def candidates() -> tuple[str, ...]:
    """Files of fonts with many letters."""
    return tuple(sorted(_found()))


def _found() -> Iterator[str]:
    for place in PLACES:
        folder = Path(place).expanduser()
        for path in folder.rglob("*") if folder.is_dir() else ():
            name = path.name.lower()
            if path.suffix.lower() in (".ttf", ".otf", ".ttc") and any(part in name for part in MANY_LETTERS):
                yield str(path)
