"""The one reader of JSON that somebody else wrote: bounded in size and depth, plain numbers, no name twice."""

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, quoted

MOST_BYTES = 64 * 2**20  # an index of shards of the largest models has 1
_MOST_DIGITS = 20  # of a random seed


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file (UTF-8).

    Raises:
        CheckpointError: the file cannot be read, or as :func:`parse`.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path.name} does not exist or is not a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, MOST_BYTES + 1))  # takes as much memory as it is told, whatever there is
    except OSError as problem:
        raise CheckpointError(f"{path.name} cannot be read ({problem})") from problem
    return parse(content, path.name)


def parse(content: str | bytes, what: str) -> dict[str, Any]:
    """The object in a JSON text; raises as :func:`value`, and where it holds something else than an object."""
    found = value(content, what)
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} holds a JSON {type(found).__name__}, expected an object with names, {{...}}")
    return found


def value(content: str | bytes, what: str) -> Any:
    """Whatever a JSON text holds.

    Args:
        content: the text; bytes are UTF-8.
        what: what it is, as the subject of an error message.

    Raises:
        CheckpointError: it is no JSON, longer than :data:`MOST_BYTES`, nested too deep, holds a
            name twice, NaN, infinity or a number of more than 20 digits.
    """
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{what} holds more than {MOST_BYTES // 2**20} MB of JSON; it is none of ours")
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8")
        return json.loads(
            content,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError as problem:
        raise CheckpointError(f"{what} is not readable JSON: it is nested too deep") from problem
    except ValueError as problem:
        raise CheckpointError(f"{what} is not readable JSON ({_short(problem)})") from problem


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {quoted(twice)} comes twice")
    return made


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS + 1:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:30]} is too large a number")
    return value


def _short(problem: Exception) -> str:
    text = str(problem)
    return text if len(text) <= 200 else f"{text[:200]}..."
