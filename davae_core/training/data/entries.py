"""What one entry of --data.images says: a place, and what holds for the images there.

``cats::repeats=3::prefix=a photo of`` is the folder ``cats`` with two settings. Two colons keep apart what Windows
paths (``D:\\cats``), spaces and commas are part of.
"""

import os
from dataclasses import dataclass, fields, replace

from ...errors import DAVAEError

MARK = "::"


@dataclass(frozen=True)
class Entry:
    """Where images are, and what holds for all of them."""

    place: str
    """A folder, or shards."""
    repeats: int = 1
    """How often an epoch goes through these images."""
    prefix: str = ""
    """What comes before every caption: a trigger word, or "a photo of". It is the whole caption where there is none."""
    suffix: str = ""
    """What comes after every caption, likewise."""
    size: int = 0
    """Side of the square that these images are cut to, or the root of their area, instead of --data.size; 0: that."""

    def captions(self, read: tuple[str, ...]) -> tuple[str, ...]:
        """Captions with what comes before and after them."""
        if not self.prefix and not self.suffix:
            return read
        return tuple(_joined(_joined(self.prefix, caption), self.suffix) for caption in read or ("",))


def parse(text: str) -> Entry:
    """Read an entry.

    Args:
        text: ``PLACE`` or ``PLACE::setting=value::...``; a path that is there is a place, whatever it looks like.

    Raises:
        DAVAEError: there is no such setting, or its value cannot be.
    """
    place, *settings = text.split(MARK)
    if not settings or os.path.exists(text):
        return Entry(text)
    entry, known = Entry(place), [field.name for field in fields(Entry)][1:]
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip()
        if not equals or name not in known:
            raise DAVAEError(
                f"{text!r} (--data.images): {setting!r} is no setting; expected {MARK.join(['FOLDER', *known])} with "
                f'values, for example "cats{MARK}repeats=3{MARK}prefix=a photo of"'
            )
        if name == "prefix":
            entry = replace(entry, prefix=value.strip())
        elif name == "suffix":
            entry = replace(entry, suffix=value.strip())
        elif not value.strip().isdecimal() or not int(value):
            raise DAVAEError(f"{text!r} (--data.images): {name} is a whole number of at least 1, got {value!r}")
        elif name == "repeats":
            entry = replace(entry, repeats=int(value))
        else:
            entry = replace(entry, size=int(value))
    return entry


def _joined(before: str, after: str) -> str:
    """Two parts of a caption with a space between, but for one before a full stop or comma."""
    space = " " if before and after and after[0] not in ",.;:!?" else ""
    return f"{before}{space}{after}"
