"""Letters on the demo's sheet: shown, or said not to be."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from harness import fonts, sheet

NOBODYS = "\U0010fffc\U0010fffb"  # letters that no font has


def test_a_font_that_lacks_a_letter_is_told_from_one_that_has_it() -> None:
    own = ImageFont.load_default(14)
    assert fonts.shows(own, "3d peach") and not fonts.shows(own, NOBODYS) and not fonts.shows(own, "a" + NOBODYS)
    assert fonts.font_for(NOBODYS, 14) is None


def test_an_installed_font_with_the_letters_is_taken() -> None:
    own = ImageFont.load_default(14)
    text = next((t for t in ("груша", "桃子", "\u2200") if not fonts.shows(own, t) and fonts.font_for(t, 14)), None)
    if text is None:
        pytest.skip("no font with other letters than Pillow's is installed")
    assert fonts.shows(fonts.font_for(text, 14), text)


def test_a_sheet_says_which_prompt_no_font_can_show() -> None:
    """Boxes came out, alike for every prompt."""
    rows = [("3d peach", [("a", Image.new("RGB", (8, 8)))]), (NOBODYS, [("a", Image.new("RGB", (8, 8)))])]
    said = [(rows[0][0], rows[0][1]), (f"prompt 2: {sheet.NO_FONT}", rows[1][1])]
    assert np.array_equal(np.asarray(sheet.contact_sheet(rows)), np.asarray(sheet.contact_sheet(said)))
