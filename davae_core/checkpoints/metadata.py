"""The metadata of our safetensors files: what kind of file it is, its configuration, and who made it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime, timezone
from typing import Any, Literal

from ..adapter import Recommended
from ..errors import CheckpointError, DAVAEError
from ..latent import LatentSpec

FORMAT = "1"
Kind = Literal["autoencoder", "adapter", "model"]
KINDS: tuple[Kind, ...] = ("autoencoder", "adapter", "model")


def build(
    kind: Kind,
    latent: LatentSpec,
    recommended: Recommended = Recommended(),
    *,
    title: str,
    author: str = "",
    licence: str = "",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Metadata for :func:`davae_core.checkpoints.files.save`.

    Args:
        kind: what the file holds.
        latent: channels, scale and normalisation.
        recommended: training size and sampling settings.
        title, author, licence: for people; stored under ``modelspec.*``.
        extra: further entries of the configuration, JSON values.
    """
    config = {"latent": asdict(latent), "recommended": asdict(recommended), **(extra or {})}
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
    }


def kind_of(metadata: Mapping[str, str]) -> str | None:
    """The kind the metadata claims, or None for files that are not ours."""
    return metadata.get("davae.kind")


def parse(metadata: Mapping[str, str], kind: Kind, file: str) -> tuple[LatentSpec, Recommended, dict[str, Any]]:
    """Read the metadata of a file of a given kind.

    Returns:
        The latent, the recommended settings, and the whole configuration.

    Raises:
        CheckpointError: the configuration is missing, of another version or kind, or not readable.
    """
    if kind_of(metadata) != kind:
        raise CheckpointError(f"{file} holds {kind_of(metadata) or 'no DA-VAE metadata'}, expected kind {kind!r}")
    if metadata.get("davae.format") != FORMAT:
        raise CheckpointError(
            f"{file} has file format {metadata.get('davae.format')!r}, this version reads {FORMAT!r}; "
            "update the node pack"
        )
    try:
        config = json.loads(metadata["davae.config"])
        latent = _dataclass(LatentSpec, config["latent"])
        recommended = _dataclass(Recommended, config.get("recommended", {}))
    except (KeyError, TypeError, json.JSONDecodeError, DAVAEError) as problem:
        raise CheckpointError(f"{file}: the configuration in its metadata is damaged ({problem})") from problem
    return latent, recommended, config


def _dataclass(cls: type, values: Mapping[str, Any]) -> Any:
    """Build a dataclass from JSON values, lists becoming tuples; unknown entries are an error."""
    unknown = set(values) - {field.name for field in fields(cls)}
    if unknown:
        raise CheckpointError(f"unknown settings {', '.join(sorted(unknown))}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
