"""Tensors computed once and kept on disk: shards of records, each with a checksum, and an index of the finished set.

A shard is a safetensors file whose tensors are named ``key.part``; its header holds the SHA-256 of its data and what
the set is about. The shards are the truth: work that was cut off goes on from those that are whole, and the index is
written when all are there.
"""

import hashlib
import json
import logging
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import atomic
from .checkpoints import files, foreign_json
from .errors import CheckpointError, DAVAEError, WriteError, quoted, shortened
from .lock import holding

INDEX, LOCK = "index.json", ".lock"
FORMAT = 1
SAMPLES, SAMPLE = 16, 1 << 20
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_NAME = re.compile(r"shard_(\d{6})\.safetensors")

Record = Mapping[str, torch.Tensor]
logger = logging.getLogger(__name__)


@dataclass
class Found:
    """What a folder holds already.

    Attributes:
        shards: keys by whole shard, in order.
        damaged: files that do not hold what they held when they were written.
    """

    shards: dict[str, list[str]] = field(default_factory=dict)
    damaged: list[Path] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """Of all records in whole shards."""
        return {key for keys in self.shards.values() for key in keys}

    @property
    def free(self) -> Iterator[int]:
        """Numbers of shards to write."""
        taken = {int(match[1]) for name in self.shards if (match := _NAME.fullmatch(name))}
        number = 0
        while True:
            if number not in taken:
                yield number
            number += 1


def write(
    folder: Path,
    number: int,
    records: Mapping[str, Record],
    kind: str,
    about: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> Path:
    """Write a shard, whole or not at all.

    Args:
        folder: of the set.
        number: of the shard.
        records: tensors by part, by key; keys have no dot.
        kind: what the set is.
        about: what it was made with; the same for all shards of a set.
        names: what the records are of, for people, by key.
    """
    path = folder / f"shard_{number:06d}.safetensors"
    tensors = {f"{key}.{part}": tensor for key, record in records.items() for part, tensor in record.items()}
    told = {"davae.kind": kind, "davae.about": json.dumps(about, sort_keys=True)}
    files.save(path, tensors, told | ({"davae.names": json.dumps(dict(names))} if names else {}))
    return path


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, no other process may add to the set in a folder. It is made, and removed where nothing is left in it.

    Raises:
        DAVAEError: another process is at work in it.
        WriteError: it cannot be made or written to.
    """
    made = not folder.exists()
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LOCK).open("ab").close()
        except OSError as problem:
            raise WriteError(f"{folder} cannot be written to ({problem}); --out names another folder") from problem
        if made:
            held.callback(_remove, folder.rmdir)  # leaves it where there is anything in it
        try:
            free = held.enter_context(holding(folder / LOCK))
        except OSError as problem:
            logger.warning("%s cannot be locked (%s): see to it that nothing else writes to it", folder, problem)
            free = True
        if not free:
            raise DAVAEError(
                f"another process is at work in {folder}: wait for its end and run this again, stop it, or choose "
                "another folder (--out)"
            )
        held.callback(_remove, (folder / LOCK).unlink)
        yield


def _remove(remove: Callable[[], None]) -> None:
    with suppress(OSError):
        remove()


def survey(folder: Path, kind: str, about: Mapping[str, Any]) -> Found:
    """Check every shard in ``folder`` against its checksum.

    Raises:
        DAVAEError: a shard is of another kind, or was made with something else.
    """
    found = Found()
    for path in sorted(folder.glob("shard_*.safetensors")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            names, told = files.read_metadata(path)
        except CheckpointError:
            found.damaged.append(path)
            continue
        was = foreign_json.parse(told.get("davae.about", "{}"), f"davae.about of {path}")
        if told.get("davae.kind") != kind or was != dict(about):
            differing = [name for name in {**was, **about} if was.get(name) != about.get(name)][:4]
            other = [f"{shortened(name)}: {quoted(was.get(name))}, now {quoted(about.get(name))}" for name in differing]
            why = "; ".join(other) or f"it holds {quoted(told.get('davae.kind', 'something unknown'))}, not {kind!r}"
            raise DAVAEError(f"{path} was made with something else ({why}); write to another folder, or remove it")
        if data_hash(path) != told.get(files.HASH_KEY):
            found.damaged.append(path)
            continue
        found.shards[path.name] = list(dict.fromkeys(name.split(".", 1)[0] for name in names))
    return found


def finish(folder: Path, kind: str, about: Mapping[str, Any]) -> Path:
    """Write the index of all shards in ``folder``, whole or not at all."""
    listed = []
    for path in sorted(folder.glob("shard_*.safetensors")):
        names, told = files.read_metadata(path)
        keys = list(dict.fromkeys(name.split(".", 1)[0] for name in names))
        listed.append({"file": path.name, "bytes": path.stat().st_size, "sha256": told[files.HASH_KEY], "keys": keys})
    content = {"format": FORMAT, "kind": kind, "about": dict(about), "shards": listed}
    path = folder / INDEX
    atomic.write(path, json.dumps(content).encode())
    return path


def data_hash(path: Path) -> str:
    """SHA-256 of the tensor data of a safetensors file, as its header has it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return f"0x{digest.hexdigest()}"


def stored(record: Record, dtype: torch.dtype, name: str) -> dict[str, torch.Tensor]:
    """A record in the type it is stored in.

    Raises:
        DAVAEError: a number does not fit.
    """
    out = {part: tensor.to(dtype) for part, tensor in record.items()}
    for part, tensor in out.items():
        if not torch.isfinite(tensor).all():
            raise DAVAEError(
                f"what was computed of {name} ({part}) does not fit {dtype} or is not a number; use --dtype fp32, "
                "and if that fails too, other model files"
            )
    return out


def fingerprint(paths: Iterable[Path]) -> str:
    """Tells files apart: a hash of their sizes, their headers and samples of their data."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with open(path, "rb") as file:
            for i in range(SAMPLES):
                file.seek(i * max(0, size - SAMPLE) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:32]


class RecordSet:
    """A finished set, memory-mapped: a record is read from disk when it is asked for.

    Args:
        folder: of the set.
        kind: what it must be.
        maker: the command that makes it, for errors.

    Raises:
        DAVAEError: it is not finished, of another kind or format, or a shard is not the one that the index tells of.
            Only headers and sizes are looked at; the maker, run again, checks all data.
    """

    def __init__(self, folder: Path, kind: str, maker: str) -> None:
        self.folder, self.maker = folder, maker
        told = _index(folder, kind, maker)
        self.about: dict[str, Any] = told["about"]
        self.names: dict[str, str] = {}
        """What records are of, by key, where that was said."""
        self._files: list[Path] = []
        self._open: dict[int, Any] = {}
        self._place: dict[str, int] = {}
        for number, shard in enumerate(told["shards"]):
            path = folder / shard["file"]
            whole = path.is_file() and path.stat().st_size == shard["bytes"]
            header = files.read_metadata(path)[1] if whole else {}
            if header.get(files.HASH_KEY) != shard["sha256"]:
                raise DAVAEError(f"{path} is missing or damaged; run {maker} again: it makes only what is missing")
            self._files.append(path)
            self.names |= foreign_json.parse(header.get("davae.names", "{}"), f"the names in {path}")
            self._place.update(dict.fromkeys(shard["keys"], number))

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def __getstate__(self) -> dict[str, Any]:
        """For processes that load: each opens the files itself."""
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self._place)

    def get(self, key: str, parts: Iterable[str]) -> list[torch.Tensor]:
        """Parts of a record that is there."""
        number = self._place[key]
        if number not in self._open:
            self._open[number] = files.tensors_of(self._files[number])
        file = self._open[number]
        return [file.get_tensor(f"{key}.{part}") for part in parts]


def _index(folder: Path, kind: str, maker: str) -> dict[str, Any]:
    """The content of the index."""
    path = folder / INDEX
    if not path.is_file():
        raise DAVAEError(f"{folder} is not a finished set: it has no {INDEX}; run {maker}, again if it was cut off")
    try:
        told = foreign_json.read(path)
    except CheckpointError as problem:
        raise DAVAEError(f"{path} is damaged ({problem}); run {maker} again") from None
    if told.get("format") != FORMAT or told.get("kind") != kind:
        raise DAVAEError(
            f"{path} tells of {quoted(told.get('kind'))} in format {quoted(told.get('format'))}, expected {kind!r} in "
            f"format {FORMAT}; give the folder that {maker} wrote"
        )
    if not isinstance(told.get("about"), dict) or not _lists_shards(told.get("shards")):
        raise DAVAEError(f"{path} is damaged (it does not list its shards); run {maker} again")
    return told


def _lists_shards(shards: Any) -> bool:
    """Whether an index lists files of its own folder, each with its size, its hash and the records in it."""
    return isinstance(shards, list) and all(
        isinstance(shard, dict)
        and isinstance(shard.get("file"), str)
        and _NAME.fullmatch(shard["file"])
        and isinstance(shard.get("keys"), list)
        and all(isinstance(key, str) for key in shard["keys"])
        and {"bytes", "sha256"} <= set(shard)
        for shard in shards
    )
