"""Modules run as programs, in processes forked from one that has torch and its company imported already.

    done = warm.run("davae_core.training.plan", "--gpus", "8")
    done.returncode, done.stdout, done.stderr

A process that starts from nothing takes three seconds of CPU until a training begins; a forked one a tenth of it. The
repository's own modules are imported afresh each time. POSIX only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import precision
from .locate import REPOSITORY

COMPANY = [
    "torch",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "accelerate",
    "safetensors.torch",
    "tyro",
    "PIL",
]


class Program:
    """A module that runs as ``python -m MODULE ARGUMENTS`` would; has what tests need of a ``subprocess.Popen``.

    Args:
        module: the module's name.
        arguments: its command line.
        environment: environment variables beside those of this process.
        session: let it lead a session of its own, as a program in a terminal does.
        folder: where it runs; the repository by default.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        session: bool = False,
        folder: Path = REPOSITORY,
    ) -> None:
        self._said = tempfile.TemporaryDirectory(prefix="davae-warm-")
        self._files = [Path(self._said.name) / name for name in ("stdout", "stderr")]
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(COMPANY)
        variables = {**os.environ, **(environment or {})}
        self._process = processes.Process(
            target=_become,
            args=(module, arguments, variables, session, str(folder), [str(file) for file in self._files]),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The number of the process, and of its group where it leads a session."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, the negative number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same as a function, as in subprocess."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to this process alone; nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what it wrote to stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it was still running after so many seconds, and has been killed.
        """
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired("\n".join(self._read()), timeout or 0)
        out, err = self._read()
        return out, err

    def _read(self) -> list[str]:
        return [file.read_text(encoding="utf-8") if file.exists() else "" for file in self._files]


def run(module: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a module to its end; the options are those of :class:`Program`."""
    program = Program(module, *arguments, **options)
    out, err = program.communicate()
    return subprocess.CompletedProcess([module, *arguments], program.returncode or 0, out, err)


def _become(
    module: str, arguments: list[str], variables: dict[str, str], session: bool, folder: str, files: list[str]
) -> None:
    if session:
        os.setsid()
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.path.insert(0, str(REPOSITORY))
    sys.argv = [module, *arguments]
    precision.force()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
