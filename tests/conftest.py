"""Fixtures that give a test a real ComfyUI: in this process (`comfy`), as a `server`, in a browser (`browser_page`)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Toy models run three times faster on one thread; must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["harness.suite"]

# ComfyUI has top-level modules called `nodes`, `utils`, `server` and `app`; this repository has a folder `nodes`. So
# the repository goes to the end of sys.path, to have `davae_core` and `harness` found by name, and HeadlessComfy puts
# ComfyUI's root at its front. Tests are imported with --import-mode=importlib, which adds nothing to sys.path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]

from harness.browser import ComfyPage, open_comfy  # noqa: E402
from harness.chromium import MISSING, find_chromium  # noqa: E402
from harness.headless import HeadlessComfy  # noqa: E402
from harness.locate import ComfyUI, find_comfyui  # noqa: E402
from harness.scratch import make_base  # noqa: E402
from harness.server import RealServer  # noqa: E402


@pytest.fixture(scope="session")
def comfyui() -> ComfyUI:
    """The ComfyUI under test (COMFYUI_DIR, or the registry's)."""
    return find_comfyui()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory of `comfy`, with this pack linked into its custom_nodes."""
    return make_base(tmp_path_factory.mktemp("headless"), _pack())


@pytest.fixture(scope="session")
def comfy(base: Path, comfyui: ComfyUI) -> HeadlessComfy:
    """A ComfyUI booted in this process, with previews on."""
    return HeadlessComfy(base, comfyui)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, comfyui: ComfyUI) -> Iterator[RealServer]:
    """A running ComfyUI server with a base directory of its own (`server.base`)."""
    with RealServer(make_base(tmp_path_factory.mktemp("server"), _pack()), comfyui) as running:
        yield running


@pytest.fixture
def browser_page(server: RealServer) -> Iterator[ComfyPage]:
    """ComfyUI's front end in a fresh Chromium; without one it skips, or fails where DAVAE_REQUIRE_BROWSER=1."""
    with _browser(server) as page:
        yield page


@pytest.fixture(scope="module")
def module_page(server: RealServer) -> Iterator[ComfyPage]:
    """The same, open for all tests of a file.

    Not longer: Playwright holds an event loop in this thread while it is open.
    """
    with _browser(server) as page:
        yield page


@contextlib.contextmanager
def _browser(server: RealServer) -> Iterator[ComfyPage]:
    reason = _why_no_browser()
    if reason and os.environ.get("DAVAE_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{reason} (DAVAE_REQUIRE_BROWSER=1)")
    if reason:
        pytest.skip(reason)
    with open_comfy(server) as page:
        yield page


def _why_no_browser() -> str | None:
    if importlib.util.find_spec("playwright") is None:
        return "no playwright in this environment: pip install playwright"
    return MISSING if find_chromium() is None else None


def _pack() -> Path | None:
    return ROOT if (ROOT / "__init__.py").exists() else None
