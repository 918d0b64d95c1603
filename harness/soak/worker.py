"""One process that spoils and reads, file after file, and measures: ``python -m harness.soak.worker FOLDER SEED``.

Takes numbers of files from its standard input, one a line, and answers each with a line of JSON. A process of its own,
because a file may end it.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks import memory
from davae_core.errors import DAVAEError

from . import damage, outcomes
from .subjects import TURNS, Subject, WrongError

MOST_SECONDS = 2.0
MOST_BYTES = 200 * 2**20


def spoil(seed: int, number: int, originals: Path, place: Path) -> tuple[Subject, Path, str, int]:
    """Make file ``number``: what reads it, where it is, what was done to it, and its size in bytes."""
    rng = random.Random(f"{seed} {number}")
    torch.manual_seed(number)
    subject = TURNS[number % len(TURNS)]
    source = originals / subject.original
    copy = place / subject.original
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copyfile(source, copy)
    target = copy / rng.choice(subject.spoiled) if source.is_dir() else copy
    chosen = rng.choice(damage.of(target))
    words = chosen(rng, target)
    files = [file for file in copy.rglob("*") if file.is_file()] if copy.is_dir() else [copy]
    return subject, copy, f"{target.name}: {words}", sum(file.stat().st_size for file in files)


def read(subject: Subject, copy: Path, place: Path, originals: Path, words: str) -> tuple[str, str]:
    """What happens, and in which words."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            subject.read(copy, place, originals)
    except DAVAEError as problem:
        # A folder is named by what lies in it; of two files that do not fit, either may be.
        named = any(name in str(problem) for name in (copy.name, str(copy), *_inside(copy)))
        return (outcomes.REFUSED if named or "base model" in str(problem) else outcomes.NAMELESS), str(problem)
    except WrongError as problem:
        return outcomes.WRONG, str(problem)
    except BaseException as problem:  # whatever else there is, is a find
        return outcomes.RAW, f"{type(problem).__name__}: {problem}"
    if ": !" in words and not (subject.looks and words.endswith("bits of the data")):
        return outcomes.WRONG, "accepted"
    return outcomes.READ, ""


def _inside(copy: Path) -> list[str]:
    return [file.name for file in copy.rglob("*")] if copy.is_dir() else []


def one(seed: int, number: int, originals: Path, place: Path) -> list:
    """``[number, outcome, subject, damage, words]``."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    subject, copy, words, size = spoil(seed, number, originals, place)
    memory.forget_peak()
    before, _ = memory.resident()
    start = time.process_time()
    outcome, said = read(subject, copy, place, originals, words)
    seconds = time.process_time() - start  # of this process alone: another may take its turn
    grown = memory.resident()[1] - before
    if outcome in (outcomes.READ, outcomes.REFUSED, outcomes.NAMELESS):
        if seconds > MOST_SECONDS:
            outcome, said = outcomes.HANG, f"{seconds:.1f} s; {said}"
        elif grown > 2 * size + MOST_BYTES:
            outcome, said = outcomes.MEMORY, f"{grown / 2**20:.0f} MB for {size / 2**20:.1f} MB; {said}"
    return [number, outcome, subject.name, words, said[:2000]]


def main() -> None:
    """Answer until the input ends."""
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.cat([torch.empty(1, device="meta")])  # at its first operation on shapes PyTorch imports for seconds
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        answer = one(seed, int(line), folder / "originals", folder / f"place-{sys.argv[3]}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
