"""Seconds of calls, taken in turn so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Seconds:
    """Timings of one call.

    Attributes:
        all: every one, in the order they were taken.
    """

    all: tuple[float, ...] = field(default_factory=tuple)

    @property
    def median(self) -> float:
        """Half of them are below."""
        return statistics.median(self.all)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of them are below the first, a quarter above the second."""
        if len(self.all) < 2:
            return self.all[0], self.all[0]
        low, _, high = statistics.quantiles(self.all, n=4, method="inclusive")
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Median, quartiles and all of them."""
        low, high = self.quartiles
        return {"median": self.median, "q1": low, "q3": high, "all": list(self.all)}


def within(budget: float, rounds: int) -> Iterator[int]:
    """Count rounds; after the first none begins that would end later than ``budget`` seconds, by what they took."""
    begin = time.perf_counter()
    for done in range(rounds):
        if done and (time.perf_counter() - begin) * (done + 1) / done > budget:
            return
        yield done


def in_turn(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    budget: float,
    warm_up: int = 1,
    synchronise: Callable[[], object] = lambda: None,
) -> list[Seconds]:
    """Time calls in turn: A, B, A, B, ...

    Args:
        calls: what to time; their results are dropped.
        rounds: how often each is timed.
        budget: seconds; after the first round none begins that would end later, by what the others took.
        warm_up: rounds before the first that counts.
        synchronise: waits for a device to be done.
    """
    for _ in range(warm_up):
        for call in calls:
            call()
    synchronise()
    taken: list[list[float]] = [[] for _ in calls]
    for _ in within(budget, rounds):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            synchronise()
            seconds.append(time.perf_counter() - start)
    return [Seconds(tuple(seconds)) for seconds in taken]


def ratio(first: Seconds, second: Seconds) -> Seconds:
    """First over second, round by round: what slows down both at a time falls out."""
    return Seconds(tuple(a / b for a, b in zip(first.all, second.all, strict=True)))


def synchroniser(device: str) -> Callable[[], object]:
    """Waits for a device to be done."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None
