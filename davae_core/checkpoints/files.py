"""Reading and writing safetensors files: nothing else is read, and a write is whole or not at all."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import atomic
from ..errors import CheckpointError, DAVAEError, WriteError, shortened
from . import header, owned
from .header import DTYPES, Header

SUFFIXES = (".safetensors", ".sft")  # two endings of one format; ComfyUI lists both
HASH_KEY = "modelspec.hash_sha256"
LAYOUT_KEY = "davae.layout"  # of the names, shapes and dtypes that the hash belongs to
HASH_BLANK = "0x" + "0" * 64
HASHED_AT_LOAD = 64 * 2**20  # bytes of a file whose hash is checked whenever it is loaded: some 50 ms


def read(path: str | os.PathLike[str], device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file, in memory of their own; see :mod:`.owned`.

    Raises:
        CheckpointError: the file is missing, is not safetensors, is cut off, or is replaced while it is read.
    """
    with Reader(path, device) as file:
        told = file.header
        layout = {name: (DTYPES[dtype], told.shapes[name]) for name, dtype in told.dtypes.items() if dtype in DTYPES}
        others = {name: file.get(name).clone() for name in told.shapes if name not in layout}
    tensors = {**owned.read(Path(path), layout), **others}
    return {name: tensors[name].to(device) for name in told.shapes}, dict(told.metadata)


def read_metadata(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by tensor name and the metadata, from the header alone; raises as :func:`read` does."""
    with Reader(path) as file:
        return dict(file.header.shapes), dict(file.header.metadata)


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Put the file's name before the message of whatever is wrong with it, unless the message names it already."""
    try:
        yield
    except DAVAEError as problem:
        if file in str(problem):
            raise
        raise CheckpointError(f"{file}: {problem}") from problem


def tensors_of(path: Path, device: str = "cpu") -> Any:
    """The file for safetensors, which takes no path that is not UTF-8: then by the number under which it is open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            return safe_open(f"/dev/fd/{file.fileno()}", framework="pt", device=device)
    return safe_open(path, framework="pt", device=device)


def is_safetensors(path: Path) -> bool:
    """Whether a file is called as safetensors files are."""
    return path.suffix.lower() in SUFFIXES


class Reader:
    """A safetensors file to read tensor by tensor. A context manager; or it is closed when nothing refers to it.

    Attributes:
        header: what the file holds.
    """

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu") -> None:
        """Open it; raises as :func:`read` does."""
        self.path = path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist or is not a file")
        if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
            raise CheckpointError(
                f"{path.name} is a pickled file, which can run code when it is read; only .safetensors files are "
                "loaded here. Convert it to safetensors first"
            )
        try:
            self.header: Header = header.read(path)
            self._file = tensors_of(path, device)
            same = set(self._file.keys()) == set(self.header.shapes)
        except (SafetensorError, OSError, RuntimeError, CheckpointError) as problem:
            raise CheckpointError(
                f"{path.name} is not a readable safetensors file ({_size(path)} bytes: {shortened(str(problem))}); it "
                "is damaged, cut off, or of another format. Copy or download it again"
            ) from problem
        if not same:
            raise self._replaced("it holds other tensors now")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def get(self, name: str) -> torch.Tensor:
        """One tensor; raises as :func:`read` does."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as problem:
            raise self._replaced(str(problem)) from problem
        if tuple(tensor.shape) != self.header.shapes[name]:
            raise self._replaced(f"{name} has another shape now")
        return tensor

    def _replaced(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} was changed while it was read ({reason}); load it again")


def check_hash(path: str | os.PathLike[str], metadata: Mapping[str, str], most: int | None = HASHED_AT_LOAD) -> bool:
    """Compare the tensor data with the hash in the metadata, where there is one.

    Args:
        path, metadata: a safetensors file and what it says of itself.
        most: leave files of more bytes unchecked; None for any size (about a second for 2 GB).

    Returns:
        Whether it was compared. It is not where the file has other names, shapes or dtypes than when it was hashed: a
        tool has written it anew, in half precision say, and has kept the old metadata.

    Raises:
        CheckpointError: they differ, or the file cannot be read.
    """
    path, told = Path(path), metadata.get(HASH_KEY, HASH_BLANK)
    try:
        if told == HASH_BLANK or len(told) != len(HASH_BLANK) or (most is not None and path.stat().st_size > most):
            return False
        known = header.read(path)
        if metadata.get(LAYOUT_KEY, known.fingerprint) != known.fingerprint:
            return False
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            file.seek(8 + length)
            found = _digest(file)
    except (OSError, struct.error) as problem:
        raise CheckpointError(f"{path.name} cannot be read ({problem})") from problem
    if found != told.lower():
        raise CheckpointError(
            f"{path.name}: its tensors are not those that it was saved with ({HASH_KEY}); it is damaged. Copy or "
            "download it again; if a tool changed it on purpose, have it leave that entry out"
        )
    return True


def _size(path: Path) -> int:
    """Of a file that may be gone by now."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return f"0x{digest.hexdigest()}"


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that ``path`` holds either the old file or the whole new one, even after a crash.

    Adds ``modelspec.hash_sha256``, the hash of the tensor data. Who may read the file is decided by the umask.

    Raises:
        WriteError: it cannot be written.
    """
    try:
        with atomic.writing(path) as temporary:
            with open(temporary, "wb"):  # safetensors makes a file that nobody but its owner may read
                pass
            mode = temporary.stat().st_mode
            whole = _separate(tensors)
            layout = header.fingerprint({name: (str(t.dtype), tuple(t.shape)) for name, t in whole.items()})
            save_file(whole, temporary, metadata={**metadata, LAYOUT_KEY: layout, HASH_KEY: HASH_BLANK})
            temporary.chmod(mode & 0o777)
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
        head = file.read(length)
        filled = head.replace(json.dumps(HASH_BLANK).encode(), json.dumps(_digest(file)).encode(), 1)
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
