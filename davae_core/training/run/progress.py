"""What a training shows: a progress bar, TensorBoard curves, sheets of samples.

None of it stops a training: what cannot be shown is said once, with the reason.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ...images import save_image, to_bytes
from . import faults, heartbeat, validation

REFRESH_SECONDS = 4.0


class _Screen:
    """Standard error, which may go away: the terminal is closed, or the program that it was piped to has ended.

    tqdm does not give its lock back where writing fails, and every other thread that shows something would wait for it
    for ever. So nothing fails here.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


class Report:
    """Writes to ``folder`` and the terminal; on all processes but the first it is silent.

    Nothing is written to the folder before there is something to show.
    """

    def __init__(self, folder: Path, start: int, steps: int, active: bool) -> None:
        self.folder, self.start, self.active = folder, start, active
        self._writer: SummaryWriter | None = None
        self._mute = False  # TensorBoard cannot be written to
        self._before = {*folder.glob("events.*"), *folder.glob(validation.FILE)}
        slow = {} if sys.stderr.isatty() else {"mininterval": REFRESH_SECONDS}
        heartbeat.at("")
        self.bar = tqdm(
            total=steps, initial=start, unit="step", disable=not active, dynamic_ncols=True, file=_Screen(), **slow
        )
        self._closed = threading.Event()
        if active:
            threading.Thread(target=self._refresh, daemon=True).start()
        self._named = _is_utf8(folder)
        if not self._named:
            self.warn(
                f"TensorBoard opens no folder whose name is not UTF-8, got {str(folder)!a}: the training goes on "
                "without its curves; for them give the run another folder (--run.out)"
            )

    @property
    def writer(self) -> SummaryWriter | None:
        """TensorBoard's, from the first use on; None on all processes but the first, and where it cannot write."""
        if self._writer is None and self.active and self._named and not self._mute:
            self._writer = SummaryWriter(str(self.folder), purge_step=self.start + 1)
        return self._writer

    def _refresh(self) -> None:
        """Let the clock of the bar go on in steps, pictures and savings that take long."""
        while not self._closed.wait(REFRESH_SECONDS):
            with suppress(OSError, ValueError):
                self.bar.refresh()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, the bar says what takes the time."""
        self.bar.set_description_str(what, refresh=False)
        try:
            yield
        finally:
            self.bar.set_description_str("", refresh=False)

    def step(self) -> None:
        """One more step is done."""
        with suppress(OSError):  # the terminal may be gone
            self.bar.update()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point on every curve."""
        self._points(step, values)
        with suppress(OSError):
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items() if name.endswith("/loss")})

    def _points(self, step: int, values: Mapping[str, float]) -> None:
        try:
            if self.writer is not None:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
        except OSError as problem:
            self._without_curves(step, problem)

    def sheet(self, step: int, image: torch.Tensor) -> None:
        """A picture ``[3, H, W]`` in [-1, 1], as ``samples/step_0000500.png`` and in TensorBoard.

        Raises:
            OSError: it cannot be written.
        """
        if self.active:
            save_image(self.folder / "samples" / f"step_{step:07d}.png", image)
            try:
                if self.writer is not None:
                    self.writer.add_image("samples", to_bytes(image), step, dataformats="HWC")
            except OSError as problem:
                self._without_curves(step, problem)

    def retry(self) -> None:
        """Try TensorBoard again, if it could not be written to."""
        self._mute = False

    def _without_curves(self, step: int, problem: OSError) -> None:
        self.warn(
            f"TensorBoard's files cannot be written at step {step} ({faults.told(problem)}): the training goes on"
        )
        broken, self._writer, self._mute = self._writer, None, True
        if broken is not None:
            with suppress(OSError):
                broken.close()

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Figures on held-out images: a curve each below ``validation/``, and a line in ``validation.jsonl``.

        Raises:
            OSError, WriteError: they cannot be written.
        """
        if self.active:
            self._points(step, {f"validation/{name}": value for name, value in values.items()})
            validation.append(self.folder, step, values)

    def say(self, line: str) -> None:
        """A line that does not break the bar."""
        if self.active:
            with suppress(OSError):
                self.bar.write(line, file=_Screen())

    def warn(self, line: str) -> None:
        """A line about something that went wrong and does not stop the training."""
        self.say(f"warning: {line}")

    def close(self) -> None:
        """Flush everything."""
        self._closed.set()
        with suppress(OSError):
            self.bar.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as problem:
                self.warn(f"the last of TensorBoard's files cannot be written ({faults.told(problem)})")
            self._writer = None

    def discard(self) -> None:
        """Remove what TensorBoard was given: the run never began."""
        self.close()
        made = {*self.folder.glob("events.*"), *self.folder.glob(validation.FILE)} - self._before
        for path in made if self.active else ():
            path.unlink()


def _is_utf8(folder: Path) -> bool:
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True
