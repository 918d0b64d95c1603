"""Which results belong into one table: those that were made with the same settings, as far as these matter for them.

Seeds, precision and the choice of variants may differ from call to call.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoints import foreign_json
from ...errors import CheckpointError, DAVAEError, quoted
from ...evaluation.family import hashed
from . import table, trainings
from .budget import BenchConfig, Steps
from .variants import Variant

BEGUN = "settings.json"  # in the folder of a run that is not finished
KEY = "made_with"  # of a result

Settings = Mapping[str, Any]

_DRAWN = ("quick", "captions", "images", "model", "text_encoder", "autoencoder")
_TRAINED = ("batch", "checkpoints", "size")
MATTER = {
    "adapter": (*_DRAWN, *_TRAINED, "steps.adapter"),
    "latent": (*_DRAWN, *_TRAINED, "steps.adapter", "steps.latent", "latent_batch", "held_out"),
    "decoder": (*_DRAWN, "adapter", "steps.decoder", "latent_batch", "held_out"),
    "sampling": (*_DRAWN, "adapter"),
}


def settings(config: BenchConfig) -> dict[str, Any]:
    """All settings of a bench that may matter: numbers, and of files and pictures the name and a hash.

    Raises:
        DAVAEError: a file is not there, or the adapter does not recommend a size.
    """
    counts = ("quick", "captions", "held_out", "batch", "latent_batch", "checkpoints")
    told: dict[str, Any] = {name: getattr(config, name) for name in counts}
    told |= {f"steps.{name}": value for name, value in vars(config.steps).items()}
    for name in ("model", "text_encoder", "autoencoder", "adapter", "predictor"):
        path: Path = getattr(config, name)
        if path.is_file():  # of what is missing the measuring says so, if it needs it
            told[name] = {"name": path.name, "hash": hashed(path)}
    told["images"] = {"name": config.images.name, "hash": _listed(config.images)}
    return told | {"size": trainings.side(config)}


def mattering(told: Settings, variant: Variant) -> dict[str, Any]:
    """Those of the settings that matter for the figures of a variant."""
    names = (*MATTER[variant.group], *(("predictor",) if variant.residual else ()))
    return {name: told[name] for name in names if name in told}


def differences(was: Settings, now: Settings) -> list[str]:
    """What differs, a clause each with both values; a setting that one of the two does not tell is the same."""
    both = [name for name in now if name in was and _of(was[name]) != _of(now[name])]
    options = {name: f"--{name.replace('_', '-')}" for name in both} | {"size": "the size that --adapter recommends"}
    return [f"{options[name]}: was {_shown(was[name])}, is {_shown(now[name])}" for name in both]


def check(out: Path, variants: Iterable[Variant], told: Settings) -> None:
    """Raise DAVAEError where the folder holds a result, or the beginning of one, that was made with other settings."""
    for variant in variants:
        for path, was in _kept(out, variant):
            if changed := differences(was, mattering(told, variant)):
                raise DAVAEError(
                    f"{path} was made with other settings than are given now ({'; '.join(changed)}), and results of "
                    "different settings cannot be compared: give another folder (--out), or the settings of before"
                )


def mixed(out: Path, variants: Sequence[Variant]) -> list[str]:
    """Of results that are in one group of the table and should not be: what differs from the first one."""
    firsts: dict[str, tuple[Path, dict[str, Any]]] = {}
    lines = []
    for variant in variants:
        for seed, result in table.finished(out, variant).items():
            path, made = table.result(out, variant, seed), mattering(recorded(result), variant)
            first, expected = firsts.setdefault(variant.group, (path, made))
            if changed := differences(expected, made):
                lines.append(f"{path} cannot be compared with {first}: {'; '.join(changed)}")
    return lines


def recorded(result: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a result was made with; of an older one the numbers alone."""
    if isinstance(made := result.get(KEY), dict):
        return made
    bench = result.get("bench", {})
    steps = {f"steps.{name}": bench["steps"][name] for name in vars(Steps()) if name in bench.get("steps", {})}
    return {name: bench[name] for name in bench if name in MATTER["latent"] and isinstance(bench[name], int)} | steps


def _kept(out: Path, variant: Variant) -> Iterator[tuple[Path, Settings]]:
    """What a folder holds of a variant, and with which settings it was made."""
    for seed, result in table.finished(out, variant).items():
        yield table.result(out, variant, seed), recorded(result)
    for path in sorted((out / variant.group / variant.name).glob(f"run_*/{BEGUN}")):
        try:
            yield path.parent, foreign_json.read(path)
        except (CheckpointError, FileNotFoundError):  # another process has just finished it
            continue


def _listed(folder: Path) -> str:
    """A hash of the names and sizes of all pictures and captions."""
    digest = hashlib.sha256()
    parts = [folder / part for part in ("train", "other", "held_out") if (folder / part).is_dir()]
    for part in parts or [folder]:
        for place, folders, names in os.walk(part, followlinks=True):
            folders.sort()
            for path in (Path(place, name) for name in sorted(names)):
                digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _of(value: Any) -> Any:
    """What is compared of a setting: of a file its content."""
    return value.get("hash") if isinstance(value, dict) else value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('name')} ({str(value.get('hash'))[:8]})"
    return quoted(value)
