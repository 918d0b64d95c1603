"""The metadata of our safetensors files: what kind of file it is, its configuration, and who made it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime, timezone
from typing import Any, Literal

from ..adapter import Recommended
from ..errors import CheckpointError, DAVAEError
from ..history import ROLES, History, Identity
from ..latent import LatentSpec

FORMAT = "1"
HISTORY = "davae.history"
Kind = Literal["autoencoder", "adapter", "model", "text_encoder"]


def build(
    kind: Kind,
    config: Mapping[str, Any],
    *,
    title: str,
    author: str = "",
    licence: str = "",
    history: History | None = None,
) -> dict[str, str]:
    """Metadata for :func:`davae_core.checkpoints.files.save`.

    Args:
        kind: what the file holds.
        config: JSON values.
        title, author, licence: for people; stored under ``modelspec.*``.
        history: how it was trained, stored under ``davae.history``; None for nothing to tell.
    """
    return {
        "davae.format": FORMAT,
        "davae.kind": kind,
        "davae.config": json.dumps(config, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"davae/{kind}",
        "modelspec.title": title,
        "modelspec.author": author,
        "modelspec.license": licence,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **history_entry(history),
    }


def history_entry(history: History | None) -> dict[str, str]:
    """The metadata that tells a history; nothing for None. For files that are not made by :func:`build`."""
    return {} if history is None else {HISTORY: json.dumps(asdict(history), sort_keys=True)}


def history_of(metadata: Mapping[str, str], file: str) -> History | None:
    """The history in a file's metadata, or None where it tells none.

    Raises:
        CheckpointError: it is damaged.
    """
    if HISTORY not in metadata:
        return None
    try:
        told = json.loads(metadata[HISTORY])
        of = {role: _identity(told["of"][role]) for role in ROLES if role in told["of"]}
        numbers = {"steps": told["steps"], "learning_rate": told["learning_rate"], "seed": told["seed"]}
        if any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers.values()):
            raise ValueError("steps, learning_rate and seed must be numbers")
        return History(**numbers, recipe=str(told["recipe"]), settings=dict(told["settings"]), of=of)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise CheckpointError(f"{file}: the history in its metadata is damaged ({problem})") from problem


def _identity(told: Mapping[str, Any]) -> Identity:
    return Identity(str(told["name"]), {name: tuple(map(float, values)) for name, values in told["values"].items()})


def latent_config(latent: LatentSpec, recommended: Recommended) -> dict[str, Any]:
    """The part of a configuration that all kinds with a latent share; read back by :func:`latent_of`."""
    return {"latent": asdict(latent), "recommended": asdict(recommended)}


def kind_of(metadata: Mapping[str, str]) -> str | None:
    """The kind the metadata claims, or None for files that are not ours."""
    return metadata.get("davae.kind")


def parse(metadata: Mapping[str, str], kind: Kind, file: str) -> dict[str, Any]:
    """The configuration in the metadata of a file of a given kind.

    Raises:
        CheckpointError: the configuration is missing, of another version or kind, or not readable.
    """
    if kind_of(metadata) is None:
        raise CheckpointError(
            f"{file} has no DA-VAE metadata. Other tools drop it when they save a model; use the file as it was before"
        )
    if kind_of(metadata) != kind:
        raise CheckpointError(f"{file} is marked as kind {kind_of(metadata)!r}, expected {kind!r}; the file is damaged")
    if metadata.get("davae.format") != FORMAT:
        raise CheckpointError(
            f"{file} has file format {metadata.get('davae.format', 'unknown')!r}, this version reads {FORMAT!r}; "
            "update the node pack"
        )
    try:
        config = json.loads(metadata["davae.config"])
    except (KeyError, json.JSONDecodeError) as problem:
        raise CheckpointError(f"{file}: the configuration in its metadata is damaged ({problem})") from problem
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{file}: the configuration in its metadata is damaged ({config!r} is no set of settings)"
        )
    return config


def latent_of(config: Mapping[str, Any], file: str) -> tuple[LatentSpec, Recommended]:
    """The latent and the recommended settings in a configuration.

    Raises:
        CheckpointError: they are missing or make no sense.
    """
    try:
        return _dataclass(LatentSpec, config["latent"]), _dataclass(Recommended, config.get("recommended", {}))
    except (KeyError, TypeError, DAVAEError) as problem:
        raise CheckpointError(f"{file}: the configuration in its metadata is damaged ({problem})") from problem


def _dataclass(cls: type, values: Mapping[str, Any]) -> Any:
    """Build a dataclass from JSON values, lists becoming tuples; unknown entries are an error."""
    unknown = set(values) - {field.name for field in fields(cls)}
    if unknown:
        raise CheckpointError(f"unknown settings {', '.join(sorted(unknown))}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
