"""A contact sheet: pictures in rows, each with a line under it that says what it is."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .fonts import font_for

Row = tuple[str, Sequence[tuple[str, Image.Image]]]

CELL = 256
GAP, LINE = 16, 18
NO_FONT = "no font on this machine has its letters"
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (90, 90, 90)


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """As large as fits into a square of ``side`` by a whole factor, every pixel a square of its own."""
    factor = max(1, side // max(picture.size))
    return picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """The sheet.

    Args:
        rows: the heading of each row, and its pictures with their labels.
    """
    side = max(CELL, *(max(picture.size) for _, row in rows for _, picture in row))
    columns = max(len(row) for _, row in rows)
    height = LINE + side + 2 * LINE + GAP  # heading, picture, label and size
    sheet = Image.new("RGB", (GAP + columns * (side + GAP), GAP + len(rows) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    for i, (heading, row) in enumerate(rows):
        top = GAP + i * height
        written = font_for(heading, 14)
        text = heading if written else f"prompt {i + 1}: {NO_FONT}"
        draw.text((GAP, top), text, INK, written or font)
        for j, (label, picture) in enumerate(row):
            left, middle = GAP + j * (side + GAP), top + LINE
            shown = enlarged(picture, side)
            sheet.paste(shown, (left, middle))
            times = shown.width // picture.width
            size = f"{picture.width} x {picture.height} px" + (f", shown {times} times as large" if times > 1 else "")
            draw.text((left, middle + side + 2), label, INK, small)
            draw.text((left, middle + side + 2 + LINE), size, FAINT, small)
    return sheet
