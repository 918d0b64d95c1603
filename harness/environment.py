"""The virtual environment a ComfyUI runs in: what it needs, how it is made, how to tell that it is all there.

Standard library only. One environment per ComfyUI: `.venv` for the copy from the package registry,
`.venv-comfyui-<version>` for one named by COMFYUI_DIR. `COMFYUI_PYTHON` names an interpreter that has everything
already; nothing is installed then.

A stamp in the environment tells its state: it says "incomplete" from before the first file to after the last one, then
holds a hash of what was asked for. Anything but the right hash means: start over. That is cheap, because pip keeps its
downloads.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .locate import REPOSITORY, VERSION_IN_WHEEL, WHEEL_SHA256, ComfyUI, find_comfyui
from .torch_build import TORCH, TORCH_COMPANIONS, fit_compiled_parts, torch_source

STAMP = "davae-environment"
INCOMPLETE = "incomplete"

# diffusers and peft are what converted files are compared with.
TEST_PACKAGES = ["pytest", "pytest-xdist", "playwright", "ruff", "mypy", "diffusers", "peft", "matplotlib"]

# What training needs besides torch; and the perceptual distance, whose own requirements only its demonstrations need.
TRAINING_PACKAGES = ["accelerate", "tyro", "tensorboard", "tqdm", "pillow", "resvg_py", "webdataset"]
PERCEPTUAL_PACKAGE = "stlpips_pytorch==0.0.2"

# Imported by ComfyUI 0.3.x but not in its requirements: other packages used to bring it.
UNDECLARED = ["requests"]

# In ComfyUI's requirements, but installed in another way or not needed to run graphs: documentation, templates, OpenGL
# and upscaler architectures.
NOT_FROM_REQUIREMENTS = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
NOT_FROM_REQUIREMENTS |= {"spandrel", "pyopengl", "comfy-angle"}

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
NEEDED_GB = 3.0

Say = Callable[[str], None]


class SetupError(RuntimeError):
    """The environment could not be made; the message says what to do."""


def prepare(say: Say) -> tuple[ComfyUI, Path]:
    """The ComfyUI to use and an interpreter that can run it; makes what is missing, and is quick when nothing is.

    Args:
        say: told, in short lines, what is being done.

    Raises:
        SetupError, locate.LocateError: with a message for the person at the terminal.
    """
    own = os.environ.get("COMFYUI_PYTHON")
    if own:
        python = shutil.which(own)
        if python is None:
            raise SetupError(f"COMFYUI_PYTHON={own} cannot be run. Set it to a Python interpreter, or unset it.")
        return find_comfyui(python), Path(python)
    venv, wanted = wanted_environment()
    python = python_of(venv)
    if read_stamp(venv) == wanted and python.exists():
        return find_comfyui(python), python
    _create(venv, say)
    comfyui = find_comfyui(python)
    say(f"ComfyUI {comfyui.version} in {comfyui.root}")
    _install(comfyui, python, say)
    write_stamp(venv, wanted)
    say(f"environment complete: {venv.name}")
    return comfyui, python


def wanted_environment() -> tuple[Path, str]:
    """The folder of the environment, and the stamp that it carries when it is complete."""
    if os.environ.get("COMFYUI_DIR"):
        comfyui = find_comfyui()
        name, asked = (
            f".venv-comfyui-{comfyui.version}",
            (comfyui.root / "requirements.txt").read_text(encoding="utf-8"),
        )
    else:  # known before anything is fetched
        name, asked = ".venv", VERSION_IN_WHEEL + WHEEL_SHA256 + CONSTRAINTS.read_text(encoding="utf-8")
    ours = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("torch*.py"))]
    packages = [*TEST_PACKAGES, *TRAINING_PACKAGES, PERCEPTUAL_PACKAGE, *UNDECLARED]
    specification = "\n".join([asked, *packages, *sorted(NOT_FROM_REQUIREMENTS), *ours])
    return REPOSITORY / name, hashlib.sha256(specification.encode()).hexdigest()


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def read_stamp(venv: Path) -> str | None:
    """INCOMPLETE, the hash of a complete environment, or None where the folder is not one of ours."""
    try:
        return (venv / STAMP).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def write_stamp(venv: Path, text: str) -> None:
    """Replaces the stamp in one step."""
    new = venv / f"{STAMP}.new"
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(venv / STAMP)


def requirements(root: Path) -> tuple[list[str], list[str]]:
    """What ComfyUI's requirements.txt asks for: (ordinary packages, packages to install without their dependencies)."""
    ordinary, bare = [], []
    for line in (root / "requirements.txt").read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        name = re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0].lower()
        if not name or name in NOT_FROM_REQUIREMENTS:
            continue
        (bare if name == "comfyui-frontend-package" else ordinary).append(line)
    return ordinary, bare


def _create(venv: Path, say: Say) -> None:
    if venv.is_symlink():
        raise SetupError(
            f"{venv} is a link to {venv.resolve()}, an environment that does not fit this checkout, and whose it is it "
            f"stays: remove the link, or, to use it as it is, set COMFYUI_PYTHON={python_of(venv)}"
        )
    if venv.exists():
        stamp = read_stamp(venv)
        if stamp is None and any(venv.iterdir()):
            raise SetupError(
                f"{venv} exists but was not made by dev.py. Move it away, or, to use it as it is, set "
                f"COMFYUI_PYTHON={python_of(venv)}"
            )
        say(f"{venv.name} is {'unfinished' if stamp == INCOMPLETE else 'out of date'}: starting over")
        write_stamp(venv, INCOMPLETE)
        for entry in venv.iterdir():  # the stamp goes last, so that an interrupted removal is still known as ours
            if entry.name != STAMP:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    free = shutil.disk_usage(REPOSITORY).free / 1e9
    if free < NEEDED_GB:
        raise SetupError(f"{venv} needs about {NEEDED_GB:.0f} GB of disk, {free:.1f} GB are free: make some room.")
    say(f"creating {venv.name}")
    venv.mkdir(exist_ok=True)
    write_stamp(venv, INCOMPLETE)
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise SetupError(
            f"`{sys.executable} -m venv {venv}` failed:\n{said}\nIf Python's venv or ensurepip module is missing: on "
            "Debian and Ubuntu, apt-get install python3-venv"
        )


def _install(comfyui: ComfyUI, python: Path, say: Say) -> None:
    source = torch_source(python, say)
    say(f"installing {TORCH} (this is the large one)")
    pip(python, TORCH, *source)
    ordinary, bare = requirements(comfyui.root)
    say(f"installing what ComfyUI {comfyui.version} and the tests need")
    pinned = ["--constraint", str(CONSTRAINTS)] if comfyui.source == "registry" else []
    pip(python, *ordinary, *UNDECLARED, *TEST_PACKAGES, *TRAINING_PACKAGES, *pinned)
    pip(python, "--no-deps", *TORCH_COMPANIONS, *source)
    pip(python, "--no-deps", PERCEPTUAL_PACKAGE)
    if bare:
        pip(python, "--no-deps", *bare)
    fit_compiled_parts(python, say)


def pip(python: Path, *arguments: str) -> None:
    """Runs `pip install`; raises SetupError with pip's last words and what they usually mean."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return
    lines = [line for line in done.stdout.strip().splitlines() if not line.startswith("WARNING")]
    advice = "The command was: " + " ".join(command)
    if re.search("No space left|not enough space|Errno 28", done.stdout):
        advice = (
            f"The disk is full: {NEEDED_GB:.0f} GB are needed where this repository lies, and some in the temp folder."
        )
    elif re.search("Failed to establish|Temporary failure|Name or service|timed out|ProxyError|SSLError", done.stdout):
        advice = "The package index was not reached: check network, proxy and pip's configuration; then run this again."
    raise SetupError("pip install failed:\n  " + "\n  ".join(lines[-6:]) + f"\n{advice}")
