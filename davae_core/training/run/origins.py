"""What a run is made from: hashes of the files, folders and images that its settings name."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import records
from ...checkpoints import foreign_json
from ..data.sources import Source
from .config import FREE, IMAGES
from .state import Origin


def origins(recipe: Any, images: Sequence[Source]) -> dict[str, Origin]:
    """Every file and folder that a recipe names, and the images, by the name of the setting.

    What is not there is left out: what needs it says so.

    Args:
        recipe: all settings.
        images: those to train on.
    """
    return of_files(recipe) | {IMAGES: of_images(images)}


def of_files(recipe: Any) -> dict[str, Origin]:
    """Those of :func:`origins` that are no images."""
    return {name: _of(path) for name, path in _paths(recipe) if name not in FREE and path.exists()}


def replaced(before: Mapping[str, Origin], now: Mapping[str, Origin]) -> dict[str, str]:
    """What is not what it was: a line for people, by the name of the setting."""
    pairs = {name: (before[name], now[name]) for name in sorted(before.keys() & now.keys())}
    return {
        name: f"{name}: was {was.about} ({was.hash[:8]}), is {is_now.about} ({is_now.hash[:8]})"
        for name, (was, is_now) in pairs.items()
        if was.hash != is_now.hash
    }


def _paths(recipe: Any, prefix: str = "") -> Iterator[tuple[str, Path]]:
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{prefix}{field.name}.")
        elif isinstance(value, Path):
            yield f"{prefix}{field.name}", value


def _of(path: Path) -> Origin:
    """A file by samples of its bytes; a set of records by what it was made with, so that it may grow."""
    if path.is_file():
        return Origin(path.name, records.fingerprint([path]))
    index = path / records.INDEX
    if index.is_file():
        told = foreign_json.read(index)
        return Origin(path.name, _hash(json.dumps([told.get("kind"), told.get("about")], sort_keys=True)))
    files = sorted(file for file in path.rglob("*.safetensors"))
    names = "\n".join(str(file.relative_to(path)) for file in files)
    return Origin(path.name, _hash(f"{records.fingerprint(files)}\n{names}"))


def of_images(found: Sequence[Source]) -> Origin:
    """The images by their names, below the folder that holds all of them, and their sizes in bytes."""
    files = {source.file for source in found}
    above = len(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]))
    sizes = {file: os.path.getsize(file) for file in files}
    digest = hashlib.sha256()
    for source in found:
        name = os.path.abspath(source.name)[above:]
        size = sizes[source.file] if source.length is None else source.length
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogatepass"))
    return Origin(f"{len(found):,} images", digest.hexdigest()[:32])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
