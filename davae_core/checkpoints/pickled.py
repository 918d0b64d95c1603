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
    if not content:
        raise CheckpointError(f"{file} holds no state dict: it is empty, expected tensors by name")
    check(content, file)
    return in_memory(content)


def check(content: Mapping[Any, Any], file: str) -> None:
    """Raise CheckpointError unless all values are plain tensors by name, each with as much memory as it shows."""
    for name, value in content.items():
        if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise CheckpointError(
                f"{file} holds no state dict: {str(name)[:80]} is a {type(value).__name__}, expected tensors by name"
            )
        plain = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{file}: {name[:80]} is a tensor of shape {list(value.shape)} that is not stored as such; it is "
                "damaged"
            )
