"""Figures with the formula they come from."""

from collections.abc import Iterable
from dataclasses import dataclass

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one part of a model for one image; a multiplication with its addition counts 2.

    Attributes:
        name: of the part.
        formula: how the forward pass is counted.
        forward: of the forward pass.
        backward: of the backward pass: 1 x forward for what is passed on to the input, 1 x for trained weights.
        again: of computing the part again in the backward pass.
    """

    name: str
    formula: str
    forward: float
    backward: float = 0.0
    again: float = 0.0

    @property
    def step(self) -> float:
        """Of a training step."""
        return self.forward + self.backward + self.again


@dataclass(frozen=True)
class Bytes:
    """Memory of one process on one device.

    Attributes:
        name: of what is held.
        formula: how it is counted.
        count: bytes.
        when: "always"; or "encoding" or "training", which are not at the same time; or of training the end of the
            forward pass alone, "loss", or what comes after it, "backward".
    """

    name: str
    formula: str
    count: float
    when: str = "always"


def peak(terms: Iterable[Bytes]) -> float:
    """The most that is held at once."""
    totals = {"always": 0.0, "encoding": 0.0, "training": 0.0, "loss": 0.0, "backward": 0.0}
    for term in terms:
        totals[term.when] += term.count
    training = totals["training"] + max(totals["loss"], totals["backward"])
    return totals["always"] + max(totals["encoding"], training)


def conv(inputs: int, outputs: int, kernel: int, pixels: float) -> float:
    """Operations of a convolution with so many output pixels."""
    return 2.0 * inputs * outputs * kernel**2 * pixels


def human(value: float, unit: str) -> str:
    """``10816000000, "FLOP"`` to ``10.8 GFLOP``."""
    for factor, prefix in UNITS:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
