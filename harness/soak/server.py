"""A server soak: ``python3 dev.py soak --minutes N``.

A real ComfyUI server is queued prompts while clients cancel them, models are unloaded, prompts fail, two clients draw
at once, calls run out of memory, and the server is killed and started again with other flags. In each of its lives the
same prompt gives the same picture, the memory after the last prompts is that after the first, and the weights of every
MODEL and VAE are the same bits.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..locate import REPOSITORY, find_comfyui
from ..result import Result
from ..scratch import make_base
from ..server import RealServer
from . import prompts, report

SABOTEUR = Path(__file__).resolve().parent / "saboteur"
RELIABILITY = REPOSITORY / "docs" / "RELIABILITY.md"
MARK = "<!-- server -->"
HEAD = "| command | ComfyUI | prompts | drawn | cancelled | refused | out of memory: drawn, reported | killed | finds |"
GROWTH = 0.02  # of the memory, after the warm-up
LONGEST = 300.0  # seconds a prompt may take on a busy machine
SEEDS = 3
ALWAYS = 2  # lives, however little time there is

# Each life of the server, in turn; flags that a ComfyUI does not know are left out.
FLAGS: list[tuple[str, ...]] = [
    (),
    ("--cache-none", "--disable-mmap"),
    ("--bf16-vae", "--bf16-unet", "--disable-smart-memory"),
    ("--fp8_e4m3fn-unet", "--cache-lru", "3"),
    ("--force-fp32", "--reserve-vram", "2"),
    ("--fp16-intermediates",),
]


@dataclass
class Counts:
    """What happened.

    Attributes:
        counts: by outcome.
        finds: what must not happen, in words.
        memory: (flags, growth of the memory) of each life.
    """

    counts: Counter = field(default_factory=Counter)
    finds: list[str] = field(default_factory=list)
    memory: list[tuple[str, float]] = field(default_factory=list)

    def find(self, words: str) -> None:
        """Note what must not happen."""
        self.finds.append(words)
        print(f"FOUND  {words}", flush=True)


class Life:
    """One life of the server, with the flags it was started with."""

    def __init__(
        self, server: RealServer, flags: Sequence[str], counts: Counts, rng: random.Random, seeds: int
    ) -> None:
        self.seeds = seeds
        self.server, self.flags, self.counts, self.random = server, " ".join(flags) or "no flags", counts, rng
        self.pictures: dict[tuple[str, int], np.ndarray] = {}
        self.clients = ThreadPoolExecutor(2)
        self.pid = 0

    def run(self, seconds: float) -> None:
        """Live for so long, beside the warm-up, and be killed in the end."""
        events = [self.alone, self.two_clients, self.cancelled, self.unloaded, self.refused, self.out_of_memory]
        for seed in range(self.seeds):  # these are the pictures to compare with
            for name in prompts.GOOD:
                self.draw(name, seed)
        for event in events:  # what is kept for good is kept by now: kernels, shapes, strips
            event()
        weights, memory = self.weights(), self.memory()
        end, first = time.monotonic() + seconds, True
        while first or time.monotonic() < end:
            first = False
            for event in events:
                event()
                if self.server.ended is not None:
                    self.counts.find(f"{self.flags}: the server ended with {self.server.ended}")
                    return
        if self.weights() != weights:
            self.counts.find(f"{self.flags}: the weights of a MODEL or VAE have changed")
        now = self.memory()
        growth = max(now[key] / memory[key] - 1 for key in memory)
        self.counts.memory.append((self.flags, growth))
        print(f"{self.flags}: memory {now['rss'] / 2**20:.0f} MiB, {growth:+.1%} since the warm-up", flush=True)
        if growth > GROWTH:
            self.counts.find(f"{self.flags}: the memory has grown by {growth:.1%}: {memory} to {now}")
        self.killed()

    def weights(self) -> list:
        """A hash of the weights of each loader's objects."""
        graph, nodes = prompts.fingerprints()
        outputs = self.server.queue(graph.prompt, timeout=LONGEST).outputs
        return [outputs[node]["text"] for node in nodes]

    def memory(self) -> dict[str, int]:
        """Bytes of the process and of its tensors, with nothing loaded."""
        self.free()
        deadline = time.monotonic() + 30
        told = self.server.get_json("/soak/memory")
        while time.monotonic() < deadline:  # the queue's thread frees when it next looks
            time.sleep(1.5)
            before, told = told, self.server.get_json("/soak/memory")
            if before == told:
                break
        return told

    def free(self) -> None:
        """As a front end's button to unload models and drop cached results.

        What failed prompts leave is collected first: ComfyUI 0.33.0's own unloading ends its worker where Python
        collects it in the middle, with stock nodes alone, too.
        """
        self.server.get("/soak/memory")
        self.server.post_json("/free", {"unload_models": True, "free_memory": True})

    # What happens to it.

    def alone(self) -> None:
        """A prompt after another."""
        for _ in range(2):
            self.draw(*self.any())

    def two_clients(self) -> None:
        """Two clients draw at the same time."""
        list(self.clients.map(lambda chosen: self.draw(*chosen), [self.any() for _ in range(4)]))

    def cancelled(self) -> None:
        """One client cancels whatever is drawn."""
        for _ in range(2):
            timer = threading.Timer(self.random.uniform(0, 1.5), lambda: self.server.post_json("/interrupt", {}))
            timer.start()
            self.draw(*self.any(), cancelled=True)
            timer.join()

    def unloaded(self) -> None:
        """Models are unloaded while they are used, and between prompts."""
        timer = threading.Timer(self.random.uniform(0, 1), self.free)
        timer.start()
        self.draw(*self.any())
        timer.join()
        self.free()
        self.draw(*self.any())

    def refused(self) -> None:
        """A prompt fails; the next one is drawn."""
        name = self.random.choice(list(prompts.BAD))
        result = self.queue(name, 0)
        wanted = prompts.BAD[name][1]
        if result is None:
            return
        if result.error is None or wanted not in result.error.exception_message:
            self.counts.find(f"{self.flags}: {name}: {result.error} where {wanted!r} was expected")
        else:
            self.counts.counts["refused"] += 1
        self.draw(*self.any())

    def out_of_memory(self) -> None:
        """A call of a layer runs out of memory: the picture is the same, or the client is told."""
        for name in self.random.sample(list(prompts.GOOD), 2):
            self.server.post_json("/soak/oom", {"at": 0})
            self.draw(name, 0)
            calls = self.server.get_json("/soak/calls")["calls"]
            error = self.random.choice(("cuda", "mps", "cpu"))
            self.server.post_json("/soak/oom", {"at": self.random.randint(1, max(calls, 1)), "error": error})
            self.draw(name, 0, out_of_memory=True)
            self.server.post_json("/soak/oom", {"at": 0})
            self.draw(name, 0)

    def killed(self) -> None:
        """A power cut in the middle of a prompt."""
        timer = threading.Timer(self.random.uniform(0.1, 1), self.server.kill)
        timer.start()
        try:
            while True:
                name, seed = self.any()
                self.server.queue(prompts.graph(name, seed).prompt, timeout=LONGEST)
        except Exception:  # whatever a client meets whose server is gone
            self.counts.counts["killed"] += 1
        timer.join()
        self.clients.shutdown()

    # Drawing.

    def any(self) -> tuple[str, int]:
        """A prompt and a seed."""
        return self.random.choice(list(prompts.GOOD)), self.random.randrange(self.seeds)

    def queue(self, name: str, seed: int) -> Result | None:
        """Queue a prompt and wait for its end; None where there is none."""
        self.counts.counts["prompts"] += 1
        try:
            graph, error = prompts.graph(name, seed), name in prompts.BAD
            return self.server.queue(graph.prompt, timeout=LONGEST, expect_error=error)
        except AssertionError as problem:
            if "was expected to fail" in str(problem):
                self.counts.find(f"{self.flags}: {name} was drawn, and should have been refused")
                return None
            return Result(error=_error(str(problem)))
        except TimeoutError:
            self.counts.find(f"{self.flags}: {name} did not end in {LONGEST:.0f} s")
        except Exception as problem:  # of the connection
            self.counts.find(f"{self.flags}: {name}: the server does not answer ({problem!r})")
        return None

    def draw(self, name: str, seed: int, cancelled: bool = False, out_of_memory: bool = False) -> None:
        """Draw a picture and compare it with the first of that name and seed."""
        result = self.queue(name, seed)
        if result is None:
            return
        if result.interrupted and cancelled:
            self.counts.counts["cancelled"] += 1
            return
        if result.error is not None and out_of_memory and "injected" in str(result.error):
            self.counts.counts["out of memory, reported"] += 1
            return
        if result.error is not None or result.interrupted:
            self.counts.find(f"{self.flags}: {name}: {result.error or 'cancelled by nobody'}")
            return
        self.counts.counts["out of memory, drawn" if out_of_memory else "drawn"] += 1
        picture = self.picture(result)
        expected = self.pictures.setdefault((name, seed), picture)
        # Strips in place of the whole, after running out of memory, may round the other way.
        allowed = 1 if out_of_memory and "bf16" not in self.flags else 255 if out_of_memory else 0
        if picture.shape != expected.shape or np.abs(picture - expected).max() > allowed:
            self.counts.find(f"{self.flags}: {name}, seed {seed}: another picture than before")

    def picture(self, result: Result) -> np.ndarray:
        """What was saved last."""
        from PIL import Image

        saved = result.saved_images()[-1]
        return np.asarray(Image.open(io.BytesIO(self.server.image(saved)))).astype(int)


def _error(text: str):
    from ..result import GraphError

    return GraphError("execution", text, None, None, text)


def soak(minutes: float, seed: int = 0, flags: Sequence[Sequence[str]] = FLAGS, pictures: int = SEEDS) -> Counts:
    """Let a server live several lives for so long in all; each event comes at least once in a life.

    Args:
        minutes: in all, about.
        seed: of what happens.
        flags: of each life.
        pictures: of each prompt that are compared, one for each seed of its noise.
    """
    counts, rng, comfyui = Counts(), random.Random(seed), find_comfyui()
    known = (comfyui.root / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    lives = [life for life in flags if all(flag in known for flag in life if flag.startswith("--"))]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="davae-soak-") as folder:
        base = make_base(Path(folder) / "base", REPOSITORY, extra_packs=[SABOTEUR])
        prompts.write_inputs(base)
        for number, life in enumerate(lives):
            left = start + 60 * minutes - time.monotonic()
            if left < 0 and number >= ALWAYS:
                break
            print(f"life {number + 1} of {len(lives)}: {' '.join(life) or 'no flags'}", flush=True)
            with RealServer(base, comfyui, arguments=life) as server:
                Life(server, life, counts, rng, pictures).run(max(0.0, left / (len(lives) - number) - 30))
    return counts


def row(counts: Counts, minutes: float, seed: int, version: str) -> str:
    """One run in the table."""
    n = counts.counts
    cells = [
        f"`python3 dev.py soak --minutes {minutes:g} --seed {seed}`", version, n["prompts"], n["drawn"], n["cancelled"],
        n["refused"], f"{n['out of memory, drawn']}, {n['out of memory, reported']}", n["killed"], len(counts.finds),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def write(document: Path, line: str, version: str) -> None:
    """Put the row of a run in the place of that of the same ComfyUI."""
    report.put(document, MARK, HEAD, line, f"| {version} |")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="dev.py soak", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=10, help="about how many minutes to run (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"put the row into {RELIABILITY.name}")
    options = parser.parse_args(argv)
    counts = soak(options.minutes, options.seed)
    for name, number in sorted(counts.counts.items()):
        print(f"{number:6}  {name}")
    for words in counts.finds:
        print(f"FOUND  {words}")
    if options.write:
        version = find_comfyui().version
        write(RELIABILITY, row(counts, options.minutes, options.seed, version), version)
    return 1 if counts.finds else 0


if __name__ == "__main__":
    sys.exit(main())
