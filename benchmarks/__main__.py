"""The command: ``python -m benchmarks [--quick | --long] [--json FILE]``."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from davae_core.errors import DAVAEError
from davae_core.evaluation import figures

from . import bounds, cases, fresh, machine, memory, sides, timing
from .record import CaseResult, SideResult
from .setup import DTYPES, SCALES, Setup

WARM_SECONDS = 150  # a round that takes longer is not warmed up: it would not show in its digits
RUN_FACTOR = 0.5  # of the rate of a large matrix product, which is what most calls reach; to guess how long one takes


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, file=sys.stderr, flush=True)


class Runner:
    """Runs cases one after another.

    Args:
        setup: where and how large, unless a case says otherwise.
        limit: seconds a case may take by the guess; longer ones are left out.
        rate: operations per second to guess with.
    """

    def __init__(self, setup: Setup, limit: float, rate: float) -> None:
        self.setup, self.limit, self.rate = setup, limit, rate
        self.left_out: dict[str, str] = {}

    def run(self, case: cases.Case) -> CaseResult | None:
        """The figures of a case, or None where it is left out; :attr:`left_out` then says why."""
        setup = self._setup(case)
        costs = [None if case.alone else sides.count(side, setup) for side in case.sides]
        guess = sum(cost.flops for cost in costs if cost) / (self.rate * RUN_FACTOR)
        if guess > self.limit and not case.slow:
            self.left_out[case.name] = f"would take about {guess:.0f} s, more than --limit {self.limit:.0f}"
            return None
        try:
            if case.alone:
                return self._alone(case, setup)
            return self._in_turn(case, setup, costs, warm_up=guess < WARM_SECONDS and not case.slow)
        except (torch.cuda.OutOfMemoryError, MemoryError) as problem:
            self.left_out[case.name] = str(problem).splitlines()[0]
            return None
        finally:
            sides.forget()

    def _setup(self, case: cases.Case) -> Setup:
        blocks = {0: self.setup.blocks, -1: 0}.get(case.blocks, case.blocks)
        return replace(self.setup, scale=case.scale or self.setup.scale, blocks=blocks)

    def _in_turn(self, case: cases.Case, setup: Setup, costs: Sequence[Any], warm_up: bool) -> CaseResult:
        calls = [sides.build(side, setup).call for side in case.sides]
        taken = timing.in_turn(calls, case.rounds, self.limit, int(warm_up), timing.synchroniser(setup.device))
        peaks: list[int | None] = [None] * len(calls)
        if case.memory:
            peaks = [self._peak(side, setup, call) for side, call in zip(case.sides, calls)]
        results = [
            SideResult(side.label, seconds, cost, peak, _rate(side, seconds))
            for side, seconds, cost, peak in zip(case.sides, taken, costs, peaks)
        ]
        sums = {
            name: sum(count * taken[place].median for place, count in parts.items())
            for name, parts in case.sums.items()
        }
        return CaseResult(case.name, case.title, setup.to_json(), tuple(results), sums)

    def _peak(self, side: sides.Side, setup: Setup, call: Callable[[], object]) -> int:
        return memory.peak(call, "cuda") if setup.device == "cuda" else fresh.measure(side, setup).peak

    def _alone(self, case: cases.Case, setup: Setup) -> CaseResult:
        with tempfile.TemporaryDirectory(prefix="davae-bench-") as folder:
            if case.write_files:
                case.write_files(Path(folder), setup)
                sides.forget()
            found = [
                [fresh.measure(side, setup, Path(folder)) for side in case.sides]
                for _ in timing.within(self.limit, case.rounds)
            ]
        results = [
            SideResult(
                side.label,
                timing.Seconds(tuple(one.seconds for one in alone)),
                peak=max(one.peak for one in alone),
                notes=alone[-1].notes,
            )
            for side, alone in zip(case.sides, zip(*found))
        ]
        return CaseResult(case.name, case.title, setup.to_json(), tuple(results))


def _rate(side: sides.Side, seconds: timing.Seconds) -> dict[str, float]:
    """Pictures per second, of sides that make whole ones."""
    return {"images_per_second": side.batch / seconds.median} if side.what.startswith("picture") else {}


def chosen(options: argparse.Namespace) -> list[cases.Case]:
    """The cases that the command line asks for.

    Raises:
        DAVAEError: no case has such a name.
    """
    gpu = options.device == "cuda"
    offered = cases.quick() if options.quick else cases.everything(gpu)
    if options.only:
        found = [case for case in offered if any(part in case.name for part in options.only)]
        if not found:
            names = ", ".join(case.name for case in offered)
            raise DAVAEError(f"no case has {' or '.join(options.only)} in its name; there are: {names}")
        return found
    return [case for case in offered if options.long or not case.slow]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="only the ratios that are stable on any machine")
    which.add_argument("--long", action="store_true", help="also the cases that take many minutes")
    parser.add_argument("--only", action="append", metavar="TEXT", default=[], help="cases with this in their name")
    parser.add_argument("--list", action="store_true", help="say which cases there are, and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--scale", choices=SCALES, default="full", help="size of the diffusion model (default: full)")
    parser.add_argument("--blocks", type=int, help="blocks of the diffusion model (default: all on a GPU, 6 on a CPU)")
    parser.add_argument(
        "--limit", type=float, default=600.0, metavar="S", help="seconds the rounds of a case may take (default: 600)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run cases, print what they gave; 1 where a bound is not kept."""
    options = parse(argv)
    todo = chosen(options)
    if options.list:
        print("\n".join(f"{case.name}: {case.title}" for case in todo))
        return 0
    torch.set_grad_enabled(False)
    gpu = options.device == "cuda"
    setup = Setup(
        device=options.device,
        dtype=options.dtype or ("bf16" if gpu else "fp32"),
        scale=options.scale,
        blocks=(0 if gpu else 6) if options.blocks is None else options.blocks,
    )
    rate = machine.matmul_flops(setup.device, setup.torch_dtype, side=1024 if options.quick else 0)
    runner = Runner(setup, options.limit, rate)
    results = []
    for case in todo:
        say(f"{case.name} ...")
        result = runner.run(case)
        if result is None:
            say(f"  left out: {runner.left_out[case.name]}")
            continue
        results.append(result)
        say("  " + ", ".join(f"{side.label} {side.seconds.median:.3g} s" for side in result.sides))
        for name, seconds in result.sums.items():
            say(f"  {name}: {seconds:.3g} s")
        kept = bounds.judge(results, [*bounds.FULL, *bounds.QUICK])
        if options.json:  # after each case, so that an interrupted run has something to show
            figures.write_json(options.json, _record(setup, rate, results, kept, runner.left_out, argv))
    kept = bounds.judge(results, [*bounds.FULL, *bounds.QUICK])
    print(figures.bounds_table(kept))
    return 0 if all(bound.passed for bound in kept) else 1


def _record(
    setup: Setup,
    rate: float,
    results: Sequence[CaseResult],
    kept: Sequence[figures.Bound],
    left_out: dict[str, str],
    argv: Sequence[str] | None,
) -> dict[str, Any]:
    """What is written down of a run."""
    return {
        "command": "python3 dev.py bench " + shlex.join(sys.argv[1:] if argv is None else argv),
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(setup.device) | {"load": machine.load(), "matmul_flops_per_second": rate},
        "setup": setup.to_json(),
        "cases": [result.to_json() for result in results],
        "bounds": [bound.to_json() for bound in kept],
        "left_out": left_out,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DAVAEError as problem:
        sys.exit(f"error: {problem}")
