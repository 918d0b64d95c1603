"""The limits that figures must keep, in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from davae_core.evaluation.figures import Bound

from .record import CaseResult
from .sides import COMFY, CORE


@dataclass(frozen=True)
class Limit:
    """A limit on a figure of a case.

    Attributes:
        case: its name.
        of: "time" or "memory", the first side's over the second's; "sum", the first sum over the second; or "shared", a
            note of the first side.
        at_least, at_most: None where there is no such limit.
    """

    case: str
    of: str
    at_least: float | None = None
    at_most: float | None = None


FULL = [
    *(Limit(f"equal size 1024 {route}", "time", at_least=4.5) for route in (COMFY, CORE)),
    *(Limit(f"equal size 2048 {route}", "time", at_least=7.0) for route in (COMFY, CORE)),
    Limit("full depth 1024", "time", at_least=4.5),
    Limit("full depth 2048", "time", at_least=7.0),
    *(Limit(f"equal tokens {size} {route}", "time", at_most=1.02) for size in (1024, 2048) for route in (COMFY, CORE)),
    *(Limit(f"decode 1024 {route}", of, at_most=1.05) for route in (COMFY, CORE) for of in ("time", "memory")),
    *(Limit(f"encode 1024 {route}", "time", at_most=1.35) for route in (COMFY, CORE)),
    *(Limit(f"tiled decode 2048 {route}", "memory", at_most=0.4) for route in (COMFY, CORE)),
    *(Limit(f"tiled decode 2048 {route}", "time", at_most=1.3) for route in (COMFY, CORE)),
    Limit("adapter application full", "time", at_most=1.5),
    *(Limit(f"adapter application {scale}", "shared", at_least=0.99) for scale in ("small", "full")),
    Limit("route 1024", "time", at_most=1.05),
    *(Limit(f"four steps 2048 {route}", "sum", at_least=40.0) for route in (COMFY, CORE)),
    Limit(f"picture 2048 batch 1 {COMFY}", "time", at_least=6.0),  # a GPU alone has time for it
]

# For a machine that does other things beside, and for models a hundredth of the size, of which what is new is more.
# Memory is not among them: at 128 px it is that of the libraries (1.11 and 1.35 in two runs).
QUICK = [
    *(Limit(f"equal tokens 256 {route}", "time", at_most=1.15) for route in (COMFY, CORE)),
    Limit("decode 128", "time", at_most=1.2),
    Limit("adapter application", "shared", at_least=0.9),
]


def judge(results: Iterable[CaseResult], limits: Iterable[Limit]) -> list[Bound]:
    """The bounds on what has been measured; cases without results have none."""
    by_name = {result.name: result for result in results}
    found = []
    for limit in limits:
        result = by_name.get(limit.case)
        value = None if result is None else result.figure(limit.of)
        if result is not None and value is not None:
            name = f"{result.title}: {limit.of} ({limit.case})"
            found.append(Bound(name, value, at_least=limit.at_least, at_most=limit.at_most))
    return found
