"""Tensors of a safetensors file in memory of their own.

safetensors maps a file, and its tensors are views on the mapping. When such a file is overwritten in place or cut off,
by ``cp`` or an interrupted download, touching a tensor ends the process (SIGBUS). What a server keeps is therefore
read: a mapping would also be slow on network drives, for which ComfyUI has ``--disable-mmap``.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import CheckpointError
from . import foreign_json, header


def read(path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    """Read tensors of a file whose header is known to be valid.

    Args:
        path: the file.
        layout: dtype and shape of each tensor wanted, by name.

    Raises:
        CheckpointError: the file ends before a tensor does, or holds others: it was changed after it was checked.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            places = foreign_json.parse(file.read(min(length, header.MOST_BYTES)), "its header")
            return {name: _tensor(file, 8 + length, places[name], *kind) for name, kind in layout.items()}
    except (EOFError, KeyError, TypeError, ValueError, struct.error) as problem:
        raise CheckpointError(f"{path.name} was changed while it was read ({problem}); load it again") from problem


def _tensor(file: BinaryIO, data: int, place: dict, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    room = tensor.reshape(-1).view(torch.uint8).numpy().data
    start, end = place["data_offsets"]
    if end - start != room.nbytes:
        raise ValueError("a tensor has another size now")
    file.seek(data + start)
    while room:
        count = file.readinto(room)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("it has become shorter")
        room = room[count:]
    return tensor
