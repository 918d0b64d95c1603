"""The pack's entry point."""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("davae_entry", root / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "old"),
    [("0.3.64", True), ("0.3.74", True), ("0.2.999", True), ("0.3.75", False), ("0.33.0", False), ("1.0.0", False)]
    + [(odd, False) for odd in ("", "unknown", "0.3", "0.3.x", "v0.3.64")],
)
def test_an_older_comfyui_is_told_which_version_is_needed(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, old: bool
) -> None:
    """Also one that asks for no entry point: the words come when the pack is imported."""
    comfyui = ModuleType("comfyui_version")
    comfyui.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfyui_version", comfyui)
    with caplog.at_level(logging.WARNING):
        load(root)
    assert ("needs ComfyUI 0.3.75 or newer" in caplog.text) == old


def test_the_version_is_the_one_of_the_project(root: Path) -> None:
    oldest = ".".join(map(str, load(root).OLDEST))
    assert f'requires-comfyui = ">={oldest}"' in (root / "pyproject.toml").read_text()
