"""What a run is judged by besides its own losses: held-out images, and the prompts of its sample sheets."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ... import atomic
from ...checkpoints import foreign_json
from ..text.asked import read_prompts
from .on_device import on_device
from .task import Batch

FILE = "validation.jsonl"
SHEET_IMAGES = 8


class Validation:
    """Held-out images and prompts of a run, the same at every call.

    Args:
        held_out: gives the held-out images anew, in an order that stays, in batches as large as a training
            micro-batch; None where the run has none.
        prompts: file for the sheets, see :func:`read_prompts`.
    """

    def __init__(self, held_out: Callable[[], Iterable[Batch]] | None = None, prompts: Path | None = None) -> None:
        self.held_out = held_out
        self.asked = read_prompts(prompts) if prompts is not None else None
        self._shown: Batch | None = None

    def __bool__(self) -> bool:
        return self.held_out is not None

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """The held-out images, one batch at a time on the device."""
        for batch in self.held_out() if self.held_out is not None else ():
            yield on_device(batch, device)

    def sheet(self, batch: Batch) -> Batch:
        """What a sheet is to show instead of ``batch``: the first held-out images, and the prompts under ``asked``."""
        if self._shown is None and self.held_out is not None:
            self._shown = _first(self.held_out())
        shown = batch
        if self._shown is not None:
            device = next((v.device for v in batch.values() if isinstance(v, torch.Tensor)), torch.device("cpu"))
            shown = on_device(self._shown, device)
        return shown if self.asked is None else shown | {"asked": self.asked}


def _first(batches: Iterable[Batch]) -> Batch | None:
    """The leading images of one shape, at most :data:`SHEET_IMAGES`, as one batch of images or of their latents."""
    parts: list[torch.Tensor] = []
    captions: list[str] = []
    key = "image"
    for batch in batches:
        key = "latent" if "latent" in batch else "image"
        if parts and batch[key].shape[1:] != parts[0].shape[1:]:
            break
        parts.append(batch[key])
        captions += batch["caption"]
        if len(captions) >= SHEET_IMAGES:
            break
    return {key: torch.cat(parts)[:SHEET_IMAGES], "caption": captions[:SHEET_IMAGES]} if parts else None


def append(folder: Path, step: int, values: Mapping[str, float]) -> None:
    """Add a line to the folder's ``validation.jsonl``; lines of this step and later ones, which a run wrote before it
    was resumed further back, go.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / FILE
    old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in old if foreign_json.parse(line, str(path)).get("step", step) < step]
    lines = [*kept, json.dumps({"step": step, **values})]
    atomic.write(path, ("\n".join(lines) + "\n").encode())
