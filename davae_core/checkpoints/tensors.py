"""Tensors that are read or made one at a time, so that a model larger than the memory can be converted."""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from .. import atomic
from ..errors import CheckpointError
from . import files, foreign_json
from .header import DTYPES, fingerprint

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensors(Mapping[str, torch.Tensor]):
    """A state dict of which a tensor is read or made when it is asked for, and forgotten after.

    Attributes:
        meta: the same names with tensors on the meta device: shapes and dtypes without reading.
    """

    def __init__(self, meta: Mapping[str, torch.Tensor], make: Callable[[str], torch.Tensor]) -> None:
        self.meta = dict(meta)
        self._make = make

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.meta:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """Some of the tensors under other names: old name by new name."""
        return Tensors({new: self.meta[old] for new, old in names.items()}, lambda new: self[names[new]])

    def below(self, *prefixes: str) -> "Tensors":
        """The tensors whose names start with a prefix, without it."""
        return self.renamed(
            {name.removeprefix(prefix): name for prefix in prefixes for name in self if name.startswith(prefix)}
        )

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Every dtype there is, the most frequent first."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.meta.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return tuple(sorted(sizes, key=lambda dtype: -sizes[dtype]))

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return sum(tensor.numel() for tensor in self.meta.values())

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.meta.values())


def in_memory(state: Mapping[str, torch.Tensor]) -> Tensors:
    """The same interface for tensors that are at hand."""
    return Tensors({name: tensor.to("meta") for name, tensor in state.items()}, lambda name: state[name])


def joined(parts: Iterable[Tensors]) -> Tensors:
    """The tensors of several files as one; a name that comes twice is taken from the last."""
    home = {name: part for part in parts for name in part}
    return Tensors({name: part.meta[name] for name, part in home.items()}, lambda name: home[name][name])


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """A safetensors file and its metadata.

    Raises:
        CheckpointError: the file cannot be read, or holds a dtype that is not known here.
    """
    file = files.Reader(path)
    return Tensors(file.header.meta(path.name), file.get), dict(file.header.metadata)


def shard_names(index: Path) -> dict[str, str]:
    """In which file of its folder each tensor of a ``*.safetensors.index.json`` lies.

    Raises:
        CheckpointError: the index is damaged, or names something outside of its folder.
    """
    home = foreign_json.read(index).get("weight_map")
    if (
        not isinstance(home, dict)
        or not home
        or not all(isinstance(name, str) and len(name.encode("utf-8", "replace")) <= 255 for name in home.values())
    ):
        raise CheckpointError(f"{index.name} is no readable index of shards: it has no weight_map, file name by tensor")
    if any(PurePosixPath(name).name != name or PureWindowsPath(name).name != name for name in home.values()):
        raise CheckpointError(f"{index.name} names files outside its folder; it is not an index that was written here")
    return home


def read_shards(index: Path) -> Tensors:
    """The safetensors files that a ``*.safetensors.index.json`` names, as one.

    Raises:
        CheckpointError: the index is damaged, or a file or tensor that it names is not there.
    """
    home = shard_names(index)
    names = sorted(set(home.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index.name} names {len(names)} files, of which {', '.join(absent)} is not there")
    tensors = joined(read(index.parent / name)[0] for name in names)
    lacking = [name for name in home if name not in tensors]
    if lacking:
        raise CheckpointError(f"{index.name} names {lacking[0]}, which is not in {home[lacking[0]]}")
    return tensors


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file tensor by tensor, whole or not at all, as :func:`davae_core.checkpoints.files.save`.

    At no time is more than one tensor in memory.

    Raises:
        CheckpointError: it cannot be written, a dtype has no name in the format, or a tensor holds NaN or infinity.
    """
    order = sorted(tensors, key=lambda name: (-tensors.meta[name].element_size(), name))  # keeps all of them aligned
    layout = fingerprint({name: (str(meta.dtype), tuple(meta.shape)) for name, meta in tensors.meta.items()})
    told = {**metadata, files.LAYOUT_KEY: layout, files.HASH_KEY: files.HASH_BLANK}
    header: dict[str, object] = {"__metadata__": told}
    start = 0
    for name in order:
        meta = tensors.meta[name]
        if meta.dtype not in _CODES:
            raise CheckpointError(f"{path.name}: the tensor {name} is {meta.dtype}, which safetensors cannot hold")
        end = start + math.prod(meta.shape) * meta.element_size()
        header[name] = {"dtype": _CODES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic.writing(path) as temporary:
        with open(temporary, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                tensor = tensors[name].detach().cpu().contiguous()
                if tensor.shape != tensors.meta[name].shape or tensor.dtype != tensors.meta[name].dtype:
                    raise CheckpointError(f"{path.name}: the tensor {name} was made otherwise than it was planned")
                files.check_finite({name: tensor}, path.name)
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        files.fill_in_hash(temporary)
