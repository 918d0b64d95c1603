"""What a run is judged by besides its own losses: held-out images, and the prompts of its sample sheets."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import atomic
from ...errors import DAVAEError
from .on_device import on_device
from .task import Batch

FILE = "validation.jsonl"
SHEET_IMAGES = 8
_SEED = re.compile(r"\s--d\s+(\d+)\s*$")


@dataclass(frozen=True)
class Asked:
    """A prompt of the sample sheets, and the seed of its noise."""

    prompt: str
    seed: int


def read_prompts(path: Path) -> list[Asked]:
    """One prompt a line; ``--d 42`` at its end is the seed of its noise, otherwise the seed is the number of the
    prompt, from 0. Empty lines and those that begin with # are left out.

    Raises:
        DAVAEError: the file cannot be read or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DAVAEError(f"the prompts in {path} cannot be read ({problem}); give a text file (--run.prompts)") from (
            problem
        )
    kept = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not kept:
        raise DAVAEError(f"{path} holds no prompts; write one a line (--run.prompts)")
    asked = []
    for number, line in enumerate(kept):
        seed = _SEED.search(f" {line}")
        asked.append(Asked(_SEED.sub("", f" {line}").strip(), int(seed[1]) if seed else number))
    return asked


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
        device = batch["image"].device if "image" in batch else torch.device("cpu")
        shown = batch if self._shown is None else on_device(self._shown, device)
        return shown if self.asked is None else shown | {"asked": self.asked}


def _first(batches: Iterable[Batch]) -> Batch | None:
    """The leading images of one shape, at most :data:`SHEET_IMAGES`, as one batch."""
    images: list[torch.Tensor] = []
    captions: list[str] = []
    for batch in batches:
        if images and batch["image"].shape[1:] != images[0].shape[1:]:
            break
        images.append(batch["image"])
        captions += batch["caption"]
        if len(captions) >= SHEET_IMAGES:
            break
    if not images:
        return None
    return {"image": torch.cat(images)[:SHEET_IMAGES], "caption": captions[:SHEET_IMAGES]}


def append(folder: Path, step: int, values: Mapping[str, float]) -> None:
    """Add a line to the folder's ``validation.jsonl``; lines of this step and later ones, which a run wrote before it
    was resumed further back, go.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / FILE
    old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in old if json.loads(line)["step"] < step] + [json.dumps({"step": step, **values})]
    atomic.write(path, ("\n".join(lines) + "\n").encode())
