"""What a training shows: a progress bar, TensorBoard curves, sheets of samples."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ...images import save_image, to_bytes
from . import validation


class Report:
    """Writes to ``folder`` and the terminal; on all processes but the first it is silent."""

    def __init__(self, folder: Path, start: int, steps: int, active: bool) -> None:
        self.folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=start + 1) if active else None
        slow = {} if sys.stderr.isatty() else {"mininterval": 30.0}
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not active, dynamic_ncols=True, **slow)

    def step(self) -> None:
        """One more step is done."""
        self.bar.update()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point on every curve."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items() if name.endswith("/loss")})

    def sheet(self, step: int, image: torch.Tensor) -> None:
        """A picture ``[3, H, W]`` in [-1, 1], as ``samples/step_0000500.png`` and in TensorBoard."""
        if self.writer is not None:
            path = self.folder / "samples" / f"step_{step:07d}.png"
            save_image(path, image)
            self.writer.add_image("samples", to_bytes(image), step, dataformats="HWC")

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Figures on held-out images: a curve each below ``validation/``, and a line in ``validation.jsonl``."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"validation/{name}", value, step)
            validation.append(self.folder, step, values)

    def say(self, line: str) -> None:
        """A line that does not break the bar."""
        if self.writer is not None:
            self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
