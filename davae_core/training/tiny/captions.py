"""What the tiny models know by name: 300 things in four styles, and which pairs of the two are held out.

The names are chosen by hand among those that all four sets draw: things that a person names at once, with a shape of
their own, and the same thing in every style. Held-out pairs are never trained on; the style and the name of each are
seen in other pairs, so drawing one is a test of composition.
"""

from dataclasses import dataclass
from pathlib import Path

from ...checkpoints import foreign_json

FILE = Path(__file__).with_name("captions.json")


@dataclass(frozen=True)
class Captions:
    """Styles, names and held-out pairs; a caption is ``"<style> <name>"``, for example ``"3d peach"``."""

    styles: tuple[str, ...]
    """One word each, in fixed order."""
    names: dict[str, str]
    """Name to its code points in hex, joined by ``-`` and without ``fe0f``."""
    held_out: frozenset[tuple[str, str]]
    """Pairs (style, name) that nothing is trained on."""
    seed: int
    """Of the held-out pairs: the sorted names without ``peach``, which the documentation draws, were shuffled with it;
    the first 100 are held out, 25 in each style."""

    @property
    def training(self) -> list[str]:
        """Captions to train on, by style, then in the order of the names."""
        return [f"{s} {n}" for s in self.styles for n in self.names if (s, n) not in self.held_out]

    @property
    def held_out_captions(self) -> list[str]:
        """Captions of the held-out pairs, by style, then in the order of the names."""
        return [f"{s} {n}" for s in self.styles for n in self.names if (s, n) in self.held_out]

    def vocabulary(self) -> list[str]:
        """Give every word of every caption once, sorted."""
        return sorted({word for text in (*self.styles, *self.names) for word in text.split()})

    def split(self, caption: str) -> tuple[str, str]:
        """Take a caption apart into (style, name). ValueError if it is no caption of this set."""
        style, _, name = caption.partition(" ")
        if style not in self.styles or name not in self.names:
            raise ValueError(
                f"{caption!r} is not a caption: expected one of {', '.join(self.styles)}, then a known name."
            )
        return style, name


def load_captions(path: Path = FILE) -> Captions:
    """Read the captions that ship with the package, or others of the same layout."""
    data = foreign_json.read(path)
    return Captions(
        styles=tuple(data["styles"]),
        names=dict(data["names"]),
        held_out=frozenset((style, name) for style, name in data["held_out"]),
        seed=data["seed"],
    )
