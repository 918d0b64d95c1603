"""Read damaged files until so many are read: run by ``dev.py soak``."""

from __future__ import annotations

import argparse
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..locate import REPOSITORY
from . import originals, outcomes, report
from .outcomes import Tally

MOST_WAIT = 60.0  # seconds without an answer, on however busy a machine
MEMORY = next((place for place in ("/dev/shm",) if os.access(place, os.W_OK)), None)  # faster than a disk
RELIABILITY = REPOSITORY / "docs" / "RELIABILITY.md"


class Worker:
    """A :mod:`harness.soak.worker`, started anew whenever it ends."""

    def __init__(self, folder: Path, seed: int, name: str) -> None:
        self.command = [sys.executable, "-m", "harness.soak.worker", str(folder), str(seed), name]
        self.process: subprocess.Popen | None = None

    def ask(self, number: int) -> list:
        """The outcome of file ``number``."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], MOST_WAIT)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        outcome = outcomes.CRASH if ready else outcomes.HANG
        self.end()
        return [number, outcome, "?", f"file {number}", "no answer"]

    def end(self) -> None:
        """Stop it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Workers:
    """Several, of which each takes the next file."""

    def __init__(self, folder: Path, seed: int, count: int) -> None:
        self.idle: queue.Queue[Worker] = queue.Queue()
        self.all = [Worker(folder, seed, str(i)) for i in range(count)]
        for worker in self.all:
            self.idle.put(worker)

    def answers(self, numbers: Iterable[int]) -> Iterator[list]:
        """The outcome of each, in their order."""
        waiting: deque[Future] = deque()
        with ThreadPoolExecutor(len(self.all)) as pool:
            for number in numbers:
                waiting.append(pool.submit(self._ask, number))
                if len(waiting) > 2 * len(self.all):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _ask(self, number: int) -> list:
        worker = self.idle.get()
        try:
            return worker.ask(number)
        finally:
            self.idle.put(worker)

    def end(self) -> None:
        """Stop all."""
        for worker in self.all:
            worker.end()


def run(files: int, seed: int, state: Path | None = None, minutes: float | None = None, workers: int = 1) -> Tally:
    """Read ``files`` damaged files.

    Args:
        files: how many, counted from the first of this seed.
        seed: of all of them.
        state: a file in which the counts are kept, to go on from.
        minutes: stop after so long; None for no limit.
        workers: processes at the same time.
    """
    tally = _load(state, seed) if state else Tally(seed)
    start, shown = time.monotonic(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="davae-soak-", dir=MEMORY) as folder:
        (Path(folder) / "originals").mkdir()
        _quietly(originals.make, Path(folder) / "originals")
        crew = Workers(Path(folder), seed, workers)
        in_time = (
            number for number in range(tally.done, files) if minutes is None or time.monotonic() - start < 60 * minutes
        )
        try:
            for answer in crew.answers(in_time):
                tally.add(*answer)
                if tally.finds and tally.finds[-1][0] == answer[0]:
                    print(*tally.finds[-1], sep="  ", flush=True)
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    print(f"{tally.done:,} of {files:,} files, {tally.bad} finds", flush=True)
                    _save(state, tally)
        finally:
            crew.end()
            _save(state, tally)
    return tally


def _quietly(function, *arguments) -> None:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        function(*arguments)


def _load(state: Path, seed: int) -> Tally:
    told = json.loads(state.read_text()) if state.is_file() else {}
    if told.get("seed") != seed:
        return Tally(seed)
    return Tally(seed, told["done"], Counter(told["counts"]), told["finds"])


def _save(state: Path | None, tally: Tally) -> None:
    if state is not None:
        told = {"seed": tally.seed, "done": tally.done, "counts": tally.counts, "finds": tally.finds}
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(told, indent=1))


def show(seed: int, number: int) -> None:
    """One file of a seed, with a traceback where it raises."""
    from . import worker

    with tempfile.TemporaryDirectory(prefix="davae-soak-", dir=MEMORY) as folder:
        place = Path(folder)
        (place / "originals").mkdir()
        _quietly(originals.make, place / "originals")
        (place / "place").mkdir()
        subject, copy, words, size = worker.spoil(seed, number, place / "originals", place / "place")
        print(f"{subject.name}, {words}, {size} bytes", flush=True)
        subject.read(copy, place / "place", place / "originals")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="dev.py soak", description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="files to read (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes")
    parser.add_argument("--workers", type=int, default=1, help="processes at the same time (default: %(default)s)")
    parser.add_argument(
        "--state", type=Path, default=Path("output/soak.json"), help="file to go on from (default: %(default)s)"
    )
    parser.add_argument("--only", type=int, metavar="N", help="one file of the seed, with its traceback")
    parser.add_argument("--write", action="store_true", help=f"put the row into {RELIABILITY.name}")
    options = parser.parse_args(argv)
    if options.only is not None:
        show(options.seed, options.only)
        return 0
    tally = run(options.files, options.seed, options.state, options.minutes, options.workers)
    for outcome in outcomes.ALL:
        print(f"{tally.counts.get(outcome, 0):8,}  {outcome}")
    if options.write:
        report.write(RELIABILITY, tally)
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
