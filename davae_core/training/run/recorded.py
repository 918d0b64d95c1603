"""A recipe as JSON and back: whole and exact, for people to read and for an export without settings."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...errors import CheckpointError

Recipe = TypeVar("Recipe")


def to_json(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def from_json(kind: type[Recipe], told: Mapping[str, Any]) -> Recipe:
    """The recipe that :func:`to_json` wrote; a setting that is newer than the record has its default.

    Raises:
        CheckpointError: the record has a setting that there is no more.
    """
    hints = typing.get_type_hints(kind)
    if unknown := told.keys() - hints.keys():
        raise CheckpointError(
            f"the run was recorded with the setting {sorted(unknown)[0]}, which this version does not know; use the "
            "version it was made with"
        )
    return kind(**{name: _value(hints[name], value) for name, value in told.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_json(hint, value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is not None and Path in options:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
