"""Reading and writing safetensors files: nothing else is read, and a write is whole or not at all."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import atomic
from ..errors import CheckpointError, WriteError

HASH_KEY = "modelspec.hash_sha256"
HASH_BLANK = "0x" + "0" * 64


def read(path: str | os.PathLike[str], device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, is not safetensors, or is cut off.
    """
    with opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_metadata(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by tensor name and the metadata, from the header alone; raises as :func:`read` does."""
    with opened(path, "cpu") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def opened(path: str | os.PathLike[str], device: str = "cpu") -> safe_open:
    """A safetensors file to read tensor by tensor; raises as :func:`read` does."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise CheckpointError(
            f"{path.name} is a pickled file, which can run code when it is read; only .safetensors files are loaded "
            "here. Convert it to safetensors first"
        )
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(
            f"{path.name} is not a readable safetensors file ({path.stat().st_size} bytes: {problem}); it is damaged, "
            "cut off, or of another format. Copy or download it again"
        ) from problem


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that ``path`` holds either the old file or the whole new one, even after a crash.

    Adds ``modelspec.hash_sha256``, the hash of the tensor data.

    Raises:
        WriteError: it cannot be written.
    """
    try:
        with atomic.writing(path) as temporary:
            save_file(_separate(tensors), temporary, metadata={**metadata, HASH_KEY: HASH_BLANK})
            fill_in_hash(temporary)
    except SafetensorError as problem:  # what it says of a full disk
        raise WriteError(f"{path} could not be written ({problem}); is there room?") from problem


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out


def fill_in_hash(path: Path) -> None:
    """Hash the tensor data, put the hash where the blank one stands, and flush to disk."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)
        digest = hashlib.sha256()
        while chunk := file.read(1 << 24):
            digest.update(chunk)
        filled = header.replace(json.dumps(HASH_BLANK).encode(), json.dumps(f"0x{digest.hexdigest()}").encode(), 1)
        file.seek(8)
        file.write(filled)
        file.flush()
        os.fsync(file.fileno())


def check_finite(tensors: Mapping[str, torch.Tensor], file: str) -> None:
    """Raise CheckpointError if any tensor holds NaN or infinity: such a model makes black images."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():  # float8 has no isfinite
            raise CheckpointError(
                f"{file}: the tensor {name} holds values that are not numbers (NaN or infinity); the file is damaged "
                "or was saved from a training that diverged. Use another file"
            )
