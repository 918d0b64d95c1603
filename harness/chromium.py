"""Finds the Chromium that the browser tests drive. Standard library only."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "no Chromium found: the browser tests need one from your system (Debian: apt-get install chromium), in the PATH or "
    "named by CHROMIUM"
)


def find_chromium() -> str | None:
    """The path of a Chromium: the one CHROMIUM names, else the first in the PATH, else None.

    Raises:
        FileNotFoundError: CHROMIUM names something that cannot be run.
    """
    named = os.environ.get("CHROMIUM")
    if named:
        found = shutil.which(named)
        if found is None:
            raise FileNotFoundError(f"CHROMIUM={named} cannot be run. Set it to a Chromium's executable, or unset it.")
        return found
    return next((path for path in map(shutil.which, NAMES) if path), None)
