"""The command line and the environment of ComfyUI's own server. Standard library only."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from .locate import ComfyUI

HOST = "127.0.0.1"


def server_command(python: Path | str, comfyui: ComfyUI, base: Path, port: int, cpu: bool = True) -> list[str]:
    """Runs the server on the loopback address, with `base` as its only models, custom nodes, input and output.

    Run it with `base` as the working directory: newer versions write a log file there.
    """
    command = [str(python), str(comfyui.root / "main.py"), "--listen", HOST, "--port", str(port)]
    command += ["--base-directory", str(base), "--disable-auto-launch", "--disable-api-nodes"]
    command += ["--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"]
    return [*command, "--cpu"] if cpu else command


def server_environment() -> dict[str, str]:
    """The environment of the server: this one's, offline and with nothing of this process on its import path."""
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    return {**keep, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
