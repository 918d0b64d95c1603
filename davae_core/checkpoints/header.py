"""The header of a safetensors file, bounded before anything is made of it.

The format: eight bytes with the header's length, the header (JSON: dtype, shape and place of each tensor, and
``__metadata__``), the data. https://github.com/huggingface/safetensors#format
"""

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from . import foreign_json

# Names of the format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# A whole SD3.5 checkpoint has 1,500 tensors and a header of 200 kB.
MOST_TENSORS = 65536
MOST_BYTES = 32 * 2**20
MOST_NAME = 256
MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Header:
    """What a file says that it holds.

    Attributes:
        dtypes: name of the dtype in the format, by tensor name.
        shapes: by tensor name.
        metadata: of the file.
    """

    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """See :func:`fingerprint`; "" where a dtype is not known here."""
        if any(dtype not in DTYPES for dtype in self.dtypes.values()):
            return ""
        return fingerprint({name: (str(DTYPES[self.dtypes[name]]), shape) for name, shape in self.shapes.items()})

    def meta(self, file: str) -> dict[str, torch.Tensor]:
        """The tensors on the meta device.

        Raises:
            CheckpointError: one is of a dtype that is not known here.
        """
        for name, dtype in self.dtypes.items():
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: the tensor {name} is stored as {dtype[:20]}, expected one of {', '.join(DTYPES)}; use a "
                    "file that is not quantised"
                )
        return {
            name: torch.empty(shape, dtype=DTYPES[self.dtypes[name]], device="meta")
            for name, shape in self.shapes.items()
        }


def fingerprint(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """A short hash of names, dtypes (``torch.float32``, ...) and shapes."""
    lines = (f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in sorted(layout.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read(path: Path) -> Header:
    """Read the header alone.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is not of the format, or larger than any model's; the message is a reason, without a name.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MOST_BYTES:
            raise CheckpointError(f"a header of {length} bytes, expected 2 to {MOST_BYTES}")
        if 8 + length > os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"its header alone has {length} bytes")
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"its header alone has {length} bytes")
    entries = foreign_json.parse(text, "the header")
    told = entries.pop("__metadata__", {})
    return _checked(entries, told)


def _checked(entries: dict[str, Any], told: Any) -> Header:
    if len(entries) > MOST_TENSORS:
        raise CheckpointError(f"it holds {len(entries)} tensors, expected at most {MOST_TENSORS}")
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise CheckpointError("its metadata is not text by name")
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in entries.items():
        if len(name) > MOST_NAME:
            raise CheckpointError(f"the name of a tensor has {len(name)} letters, expected at most {MOST_NAME}")
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise CheckpointError(f"the tensor {name} has no dtype")
        shape = entry.get("shape")
        if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_is_side, shape)):
            raise CheckpointError(f"the tensor {name} has no shape")
        dtypes[name], shapes[name] = entry["dtype"], tuple(shape)
    return Header(dtypes, shapes, told)


def _is_side(side: Any) -> bool:
    return type(side) is int and 0 <= side < 2**40
