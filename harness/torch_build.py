"""Which build of torch an environment gets, and how torchvision and torchaudio are made to fit it.

Standard library only. Without an NVIDIA GPU the CPU build is taken: the ordinary one brings gigabytes of CUDA.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

TORCH = "torch==2.13.0"
TORCH_COMPANIONS = ["torchvision==0.28.0", "torchaudio==2.11.0"]  # ComfyUI imports both; always without dependencies
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SHIM = Path(__file__).with_name("torchvision_operators.py")


def has_nvidia_gpu() -> bool:
    """Whether a driver is there that sees a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def torch_source(python: Path, say: Callable[[str], None]) -> list[str]:
    """The pip arguments that give the right build of torch: none for pip's own sources, else PyTorch's CPU index."""
    if sys.platform == "darwin" or has_nvidia_gpu() or _resolves_to_cpu_build(python):
        return []
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=15):
            return ["--index-url", CPU_INDEX]
    except (urllib.error.URLError, TimeoutError) as error:
        say(f"PyTorch's CPU index is not reachable ({error}): taking the ordinary build of torch, several GB")
        return []


def _resolves_to_cpu_build(python: Path) -> bool:
    """Whether pip, as configured here, finds a +cpu build of its own accord."""
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--quiet",
        "--dry-run",
        "--report",
        "-",
    ]
    done = subprocess.run([*command, "--no-deps", "--ignore-installed", TORCH], capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["install"][0]["metadata"]["version"].endswith("+cpu")
    except (ValueError, LookupError):  # a pip too old for reports, or torch not found: the index will tell
        return False


def fit_compiled_parts(python: Path, say: Callable[[str], None]) -> None:
    """Makes torchvision and torchaudio importable where they were compiled for another build of torch.

    Nothing changes where a plain import works. torchvision gets its operators declared (see torchvision_operators.py);
    torchaudio is made to run without its compiled part, as it does where that was never built.
    """
    packages = Path(_output(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    if not _imports(python, "torchvision"):
        say("declaring torchvision's operators (its compiled part does not match this torch)")
        shutil.copyfile(SHIM, packages / "_torchvision_operators.py")
        (packages / "_torchvision_operators.pth").write_text("import _torchvision_operators\n", encoding="utf-8")
        _output(python, "import torchvision")
    if not _imports(python, "torchaudio"):
        say("removing torchaudio's compiled part (it does not match this torch)")
        for library in (packages / "torchaudio" / "lib").glob("*torchaudio*"):
            library.unlink()
        _output(python, "import torchaudio")


def _imports(python: Path, module: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0


def _output(python: Path, code: str) -> str:
    return subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
