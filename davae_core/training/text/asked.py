"""Prompts that a run's sample sheets show, out of a text file."""

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import DAVAEError

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
