"""Shapes out of files: asked for with the number of dimensions that is expected, so that a wrong one is named."""

from collections.abc import Mapping

import torch

from .errors import CheckpointError


def dims(state: Mapping[str, torch.Tensor], name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor that must have ``count`` dimensions, none of them 0.

    Raises:
        CheckpointError: it is not there, or has another shape.
    """
    if name not in state:
        raise CheckpointError(f"the tensor {name} is not there")
    shape = tuple(state[name].shape)
    if len(shape) != count or not all(shape):
        raise CheckpointError(f"the tensor {name} has shape {list(shape)}, expected {count} dimensions, none of them 0")
    return shape


def numbered(numbers: set[int], what: str, most: int) -> int:
    """How many parts there are, by their numbers in tensor names: 0, 1, 2, ... without a gap.

    Raises:
        CheckpointError: there is a gap, or there are more than ``most``.
    """
    count = len(numbers)
    if count > most:
        raise CheckpointError(f"it has {count} {what}, more than any model of its kind (at most {most})")
    if numbers != set(range(count)):
        gap = next(i for i in range(count + 1) if i not in numbers)
        raise CheckpointError(f"its {what} are not numbered 0, 1, 2, ...: {gap} is not there")
    return count


def number_at(name: str, position: int) -> int:
    """The whole number between two dots of a tensor's name; -1 where there is none."""
    parts = name.split(".")
    part = parts[position] if position < len(parts) else ""
    return int(part) if part.isascii() and part.isdigit() and len(part) < 6 else -1
