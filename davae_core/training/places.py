"""Where the trainings of the tiny family leave their files, and how large its pictures are."""

from pathlib import Path

ROOT = Path("output/tiny")
SIZES = {"micro": 128, "tiny": 256}
"""Sides of the pictures that the adapted model draws, in pixels; the base model's are half of that."""


def folder(size: str, stage: str) -> Path:
    """Where a stage of a size leaves its files."""
    return ROOT / size / stage
