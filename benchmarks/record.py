"""What is written down of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .cost import Cost
from .timing import Seconds, ratio


@dataclass(frozen=True)
class SideResult:
    """Figures of one side.

    Attributes:
        label: what it is.
        seconds: of its calls.
        cost: operations and bytes of a call, None where they say nothing.
        peak: bytes that a call needs on top of the model; None where not measured.
        notes: further figures.
    """

    label: str
    seconds: Seconds
    cost: Cost | None = None
    peak: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it, and operations per second."""
        told: dict[str, Any] = {"label": self.label, "seconds": self.seconds.to_json()}
        if self.cost is not None:
            told |= {"flops": self.cost.flops, "bytes": self.cost.bytes}
            told["flops_per_second"] = self.cost.flops / self.seconds.median
        if self.peak is not None:
            told["peak_bytes"] = self.peak
        return told | ({"notes": self.notes} if self.notes else {})


@dataclass(frozen=True)
class CaseResult:
    """Figures of a comparison.

    Attributes:
        name, title: of the case.
        setup: what it ran with, see :class:`setup.Setup`.
        sides: at least two.
        sums: seconds of several calls together, by what they make.
    """

    name: str
    title: str
    setup: dict[str, Any]
    sides: tuple[SideResult, ...]
    sums: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> Seconds:
        """The first side's seconds over the second's, round by round."""
        return ratio(self.sides[0].seconds, self.sides[1].seconds)

    @property
    def arithmetic(self) -> float | None:
        """The first side's operations over the second's; None where they say nothing."""
        first, second = self.sides[0].cost, self.sides[1].cost
        return first.flops / second.flops if first and second and second.flops else None

    def figure(self, of: str) -> float | None:
        """A figure that may be bounded, None where it has not been measured.

        Args:
            of: "time", "memory", "sum" (the first sum over the second), or the name of a note of the first side.
        """
        first, second = self.sides[:2]
        if of == "time":
            return self.ratio.median
        if of == "memory":
            return first.peak / second.peak if first.peak is not None and second.peak else None
        if of == "sum":
            one, two = [*self.sums.values(), None, None][:2]
            return one / two if one is not None and two else None
        return first.notes.get(of)

    def to_json(self) -> dict[str, Any]:
        """All of it, and the ratio."""
        return {
            "name": self.name,
            "title": self.title,
            "setup": self.setup,
            "sides": [side.to_json() for side in self.sides],
            "ratio": self.ratio.to_json(),
            "arithmetic": self.arithmetic,
            "memory_ratio": self.figure("memory"),
            **({"sums": dict(self.sums), "sum_ratio": self.figure("sum")} if self.sums else {}),
        }


def case_from_json(told: Mapping[str, Any]) -> CaseResult:
    """Undo :meth:`CaseResult.to_json`."""
    sides = tuple(
        SideResult(
            side["label"],
            Seconds(tuple(side["seconds"]["all"])),
            Cost(side["flops"], side["bytes"]) if "flops" in side else None,
            side.get("peak_bytes"),
            side.get("notes", {}),
        )
        for side in told["sides"]
    )
    return CaseResult(told["name"], told["title"], told["setup"], sides, told.get("sums", {}))
