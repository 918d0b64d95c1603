"""Captions out of the files beside images."""

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checkpoints import foreign_json
from .errors import DAVAEError

ENDINGS = (".txt", ".caption", ".json")  # the first that is there counts
UTF8, WINDOWS = "UTF-8", "Windows-1252"


@dataclass(frozen=True)
class Captions:
    """What is said about an image.

    Attributes:
        texts: captions to choose from, each one line.
        encoding: the file's.
    """

    texts: tuple[str, ...] = ()
    encoding: str = UTF8


def read(beside: Mapping[str, bytes], name: str) -> Captions:
    """The captions of an image.

    Args:
        beside: content of the files of the same name, by ending. A ``.txt`` or ``.caption`` is one caption, its lines
            joined by spaces; a ``.json`` an object whose ``caption`` is a caption or a list of them, or such a list.
        name: of the image, for errors.

    Raises:
        DAVAEError: a file is no text.
    """
    ending = next((ending for ending in ENDINGS if ending in beside), None)
    if ending is None:
        return Captions()
    try:
        text, encoding = decoded(beside[ending])
        value: Any = foreign_json.value(text, "it") if ending == ".json" else text
    except ValueError as problem:
        raise DAVAEError(f"its caption ({ending}) cannot be read ({problem})") from None
    if isinstance(value, dict):
        value = value.get("caption")
    listed = value if isinstance(value, list) else [value]
    lines = (one_line(caption) for caption in listed if isinstance(caption, str))
    return Captions(tuple(filter(None, lines)), encoding)


def decoded(data: bytes) -> tuple[str, str]:
    """Text and its encoding: UTF-16 or UTF-8 by the byte order mark, else UTF-8, else Windows-1252 (which holds
    Latin-1's letters).

    Raises:
        ValueError: it is no text.
    """
    order = "le" if data[1::2].count(0) > data[::2].count(0) else "be"
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    guesses = (("utf-16", "UTF-16"),) if marked else (("utf-8-sig", UTF8), ("cp1252", WINDOWS))
    if b"\0" in data and not marked:
        guesses = ((f"utf-16-{order}", "UTF-16"),)
    for codec, name in guesses:
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            continue
        if all(ord(letter) >= ord(" ") or letter.isspace() for letter in text):
            return text, name
    raise ValueError("it is no text in UTF-8, UTF-16 or Windows-1252")


def one_line(text: str) -> str:
    """The lines of a text that are not empty, joined by spaces."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
