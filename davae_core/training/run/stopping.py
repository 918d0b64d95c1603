"""Requests to stop: signals, and a launcher that has ended."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C, schedulers, a terminal that closes, and what Slurm sends ahead of a time limit (--signal=USR1@120).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
ECHO_SECONDS = 0.3  # one press may arrive twice: from the terminal and from a launcher, or from `timeout`


class Stop(KeyboardInterrupt):
    """A stop that does not wait for the end of a step."""


class Stops:
    """Hears signals while it is entered: the first asks for a stop after the current step, a second Ctrl-C for one at
    once. Behind a launcher the first counts alone, since launchers repeat them.

    A signal that was ignored when the run started (``nohup``) stays ignored, but for SIGINT.
    """

    def __init__(self) -> None:
        self.reason = ""
        """What asked for the stop; empty as long as nothing did."""
        self._launcher = os.getppid() if launched() else None
        self._first = 0.0
        self._breaks, self._held, self._pending = False, False, False
        self._old: dict[int, object] = {}

    def asked(self) -> bool:
        """Whether the run is to stop."""
        if not self.reason and self._launcher is not None and os.getppid() != self._launcher:
            self.reason = "the launcher has ended"
        return bool(self.reason)

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """Inside, a request raises :class:`Stop`: for work that may be given up, as a picture."""
        self._breaks = True
        try:
            if self.asked():
                raise Stop(self.reason)
            yield
        finally:
            self._breaks = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nothing is raised, but at the end: for changes that have to be whole, as an optimiser's step."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise Stop(self.reason)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = bool(self.reason) and number == signal.SIGINT and now - self._first > ECHO_SECONDS
        if not self.reason:
            self.reason, self._first = signal.Signals(number).name, now
        elif not (again and self._launcher is None):
            return
        if not (again or self._breaks):
            return
        if self._held:
            self._pending = True
        else:
            raise Stop(self.reason)

    def __enter__(self) -> "Stops":
        for number in SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def launched() -> bool:
    """Whether ``accelerate launch`` or ``torchrun`` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
