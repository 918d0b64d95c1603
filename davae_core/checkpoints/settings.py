"""Type and range of every setting that a file may carry: checked before anything is built from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapter import Recommended
from ..errors import CheckpointError, quoted
from ..history import ROLES, History, Identity
from ..latent import LatentSpec


@dataclass(frozen=True)
class Number:
    """What a setting may be.

    Attributes:
        low, high: the range, both ends in it.
        whole: whole numbers only.
        one, many: it may be one number, or a list of at most ``most``.
        choices: only these; empty for all in the range.
    """

    low: float
    high: float
    whole: bool = False
    one: bool = True
    many: bool = False
    most: int = 4096
    choices: tuple[int, ...] = ()

    def read(self, name: str, value: Any) -> Any:
        """The value, a list as a tuple.

        Raises:
            CheckpointError: it is of another type or out of range.
        """
        if isinstance(value, list):
            if not self.many:
                raise CheckpointError(f"{name} is a list, expected {self._expected()}")
            if len(value) > self.most:
                raise CheckpointError(f"{name} holds {len(value)} numbers, expected at most {self.most}")
            return tuple(self._one(f"{name}[{i}]", item) for i, item in enumerate(value))
        if not self.one:
            raise CheckpointError(f"{name} is {_shown(value)}, expected a list of numbers")
        return self._one(name, value)

    def _one(self, name: str, value: Any) -> float:
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise CheckpointError(f"{name} is {_shown(value)}, expected {self._expected()}")
        if not self.low <= value <= self.high or (self.choices and value not in self.choices):
            raise CheckpointError(f"{name} is {_shown(value)}, expected {self._expected()}")
        return value

    def _expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return f"a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}"


# Wider than anything that was ever trained; the model's shapes say the rest.
LATENT: Mapping[str, Number] = {
    "base_channels": Number(1, 1024, whole=True),
    "detail_channels": Number(1, 4096, whole=True),
    "scale": Number(2, 4, whole=True, choices=(2, 4)),
    "base_factor": Number(1, 64, whole=True, choices=(1, 2, 4, 8, 16, 32, 64)),
    "base_shift": Number(-1e4, 1e4, many=True),
    "base_scale": Number(1e-6, 1e6, many=True),
    "detail_mean": Number(-1e4, 1e4, one=False, many=True),
    "detail_std": Number(1e-6, 1e6, one=False, many=True),
    "preview": Number(-1e4, 1e4, one=False, many=True),
}
RECOMMENDED: Mapping[str, Number] = {
    "size": Number(0, 65536, whole=True),
    "shift": Number(0, 100),
    "cfg": Number(0, 100),
    "steps": Number(0, 10000, whole=True),
}
HISTORY: Mapping[str, Number] = {
    "steps": Number(0, 1e12, whole=True),
    "learning_rate": Number(0, 1e6),
    "seed": Number(-(2**64), 2**64, whole=True),
}


def latent(values: Any) -> LatentSpec:
    """The latent that a file's ``latent`` describes.

    Raises:
        DAVAEError: a setting is unknown, of a wrong type or out of range, the units of the base latent are missing, or
            settings contradict each other.
    """
    read = _settings("latent", LATENT, values)
    if missing := [name for name in ("base_shift", "base_scale") if name not in read]:
        raise CheckpointError(
            f"latent.{missing[0]} is not there, and without the units of the base latent it cannot be told which base "
            "model it belongs to"
        )
    return LatentSpec(**read)


def recommended(values: Any) -> Recommended:
    """The recommended sampling that a file's ``recommended`` describes; raises as :func:`latent`."""
    return Recommended(**_settings("recommended", RECOMMENDED, values))


def history(values: Mapping[str, Any]) -> History:
    """The history that a file's ``davae.history`` describes; what it does not say is left out.

    Raises:
        CheckpointError: something in it is of a wrong type or out of range.
    """
    given = {name: number.read(name, values[name]) for name, number in HISTORY.items() if name in values}
    of = _named("of", values.get("of", {}))
    return History(
        **given,
        recipe=_text("recipe", values.get("recipe", "")),
        settings=_named("settings", values.get("settings", {})),
        of={role: _identity(f"of.{role}", _named(f"of.{role}", of[role])) for role in ROLES if role in of},
    )


def _identity(where: str, values: Mapping[str, Any]) -> Identity:
    told = _named(f"{where}.values", values.get("values", {}))
    if len(told) > 1024:
        raise CheckpointError(f"{where}.values holds {len(told)} tensors, expected at most 1024")
    numbers = {name: finite_numbers(told[name], f"{where}.values", 64) for name in told}
    return Identity(_text(f"{where}.name", values.get("name", "")), numbers)


def _named(name: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} is {_shown(values)}, expected values by name")
    return values


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise CheckpointError(f"{name} is {_shown(value)}, expected a text of at most 1000 letters")
    return value


def _settings(where: str, known: Mapping[str, Number], values: Any) -> dict[str, Any]:
    values = _named(where, values)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise CheckpointError(f"unknown settings in {where}: {', '.join(name[:60] for name in unknown[:4])}")
    return {name: known[name].read(f"{where}.{name}", value) for name, value in values.items()}


def finite_numbers(values: Any, name: str, most: int = 4096) -> tuple[float, ...]:
    """A list of finite numbers.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise CheckpointError(f"{name} is {_shown(values)}, expected a list of numbers")
    return Number(-1e30, 1e30, one=False, many=True, most=most).read(name, list(values))


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a set of settings"
    return quoted(value)
