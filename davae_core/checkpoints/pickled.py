"""Reading the pickled files of a release: tensors and plain values, never code."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .tensors import Tensors, in_memory

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read(path: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, with ``weights_only=True``; tensors stay on disk until they are used.

    Raises:
        CheckpointError: the file is missing or damaged, asks for code to be run, or holds no names.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as problem:  # a damaged pickle can raise anything
        reason = str(problem).strip().splitlines()
        raise CheckpointError(
            f"{path.name} is refused: it is damaged, or asks for code to be run when it is read "
            f"({type(problem).__name__}: {reason[0] if reason else ''}). Only tensors and plain values are read"
        ) from problem
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path.name} holds a {type(content).__name__}, expected tensors by name")
    return content


def tensors(content: Mapping[str, Any], file: str) -> Tensors:
    """The tensors of a state dict; other values in it are refused.

    Raises:
        CheckpointError: a value is no tensor, or there is none.
    """
    odd = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if odd or not content:
        what = f"{odd[0]} is a {type(content[odd[0]]).__name__}" if odd else "it is empty"
        raise CheckpointError(f"{file} holds no state dict: {what}, expected tensors by name")
    return in_memory(content)
