"""The metadata of our safetensors files: what kind of file it is, its configuration, and who made it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from ..adapter import Recommended
from ..errors import CheckpointError, DAVAEError, quoted
from ..history import History
from ..latent import LatentSpec
from . import foreign_json, settings

FORMAT = "1"
CONFIG = "davae.config"
HISTORY = "davae.history"
Kind = Literal["autoencoder", "adapter", "few_step_lora", "model", "predictor", "tiny_decoder", "text_encoder"]
WORDS = {"title": "modelspec.title", "author": "modelspec.author", "licence": "modelspec.license"}


@dataclass(frozen=True)
class About:
    """What a file tells people of itself, which a file that is made of it tells on.

    Attributes:
        title, author, licence: "" where it tells none.
        history: how it was trained; None where it tells nothing.
    """

    title: str = ""
    author: str = ""
    licence: str = ""
    history: History | None = None

    @property
    def words(self) -> dict[str, str]:
        """Title, author and licence by their names here."""
        return {name: getattr(self, name) for name in WORDS}

    def told(self, words: Mapping[str, str]) -> "About":
        """The same, but for the texts in ``words`` that are not empty."""
        return About(**{name: words.get(name) or text for name, text in self.words.items()}, history=self.history)

    def metadata(self) -> dict[str, str]:
        """For the metadata of files that are not made by :func:`build`; nothing where nothing is told."""
        return {key: self.words[name] for name, key in WORDS.items() if self.words[name]} | history_entry(self.history)

    def json(self) -> dict[str, Any]:
        """For a JSON file; read back by :func:`about_json`."""
        history = {"history": json.loads(history_entry(self.history)[HISTORY])} if self.history else {}
        return {name: text for name, text in self.words.items() if text} | history


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
        CONFIG: json.dumps(config, sort_keys=True),
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
    if history is None:
        return {}
    # What JSON has no word for, such as infinity, is kept as text.
    plain = json.loads(json.dumps(asdict(history), default=str), parse_constant=str)
    return {HISTORY: json.dumps(plain, sort_keys=True)}


def history_of(metadata: Mapping[str, str], file: str) -> History | None:
    """The history in a file's metadata, or None where it tells none.

    Raises:
        CheckpointError: it is damaged.
    """
    if HISTORY not in metadata:
        return None
    try:
        return settings.history(foreign_json.parse(metadata[HISTORY], HISTORY))
    except CheckpointError as problem:
        raise CheckpointError(f"{file}: the history in its metadata is damaged ({problem})") from problem


def about(metadata: Mapping[str, str], file: str) -> About:
    """What a file's metadata tells of it; raises as :func:`history_of`."""
    return About(**{name: metadata.get(key, "") for name, key in WORDS.items()}, history=history_of(metadata, file))


def about_json(values: Mapping[str, Any], file: str) -> About:
    """What a JSON file made with :meth:`About.json` tells.

    Raises:
        CheckpointError: it is damaged.
    """
    for name in WORDS:
        if not isinstance(values.get(name, ""), str):
            raise CheckpointError(f"{file}: {name} is {quoted(values[name])}, expected a text; the file is damaged")
    history = {HISTORY: json.dumps(values["history"])} if "history" in values else {}
    return About(**{name: values.get(name, "") for name in WORDS}, history=history_of(history, file))


def latent_config(latent: LatentSpec, recommended: Recommended) -> dict[str, Any]:
    """The part of a configuration that all kinds with a latent share; read back by :func:`latent_of`."""
    return {"latent": asdict(latent), "recommended": asdict(recommended)}


def recommended(own: Recommended, given: Recommended) -> Recommended:
    """The settings in ``given``, and a file's own where it says nothing."""
    return Recommended(**{name: value or getattr(own, name) for name, value in asdict(given).items()})


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
        raise CheckpointError(
            f"{file} is marked as kind {quoted(kind_of(metadata))}, expected {kind!r}; the file is damaged"
        )
    if metadata.get("davae.format") != FORMAT:
        raise CheckpointError(
            f"{file} has file format {quoted(metadata.get('davae.format', 'unknown'))}, this version reads {FORMAT!r}; "
            "update the node pack"
        )
    if CONFIG not in metadata:
        raise CheckpointError(f"{file}: the configuration in its metadata is damaged ({CONFIG} is not there)")
    try:
        return foreign_json.parse(metadata[CONFIG], CONFIG)
    except CheckpointError as problem:
        raise CheckpointError(f"{file}: the configuration in its metadata is damaged ({problem})") from problem


def latent_of(config: Mapping[str, Any], file: str) -> tuple[LatentSpec, Recommended]:
    """The latent and the recommended settings in a configuration.

    Raises:
        CheckpointError: they are missing or make no sense.
    """
    try:
        if "latent" not in config:
            raise CheckpointError("latent is not there")
        return settings.latent(config["latent"]), settings.recommended(config.get("recommended", {}))
    except DAVAEError as problem:
        raise CheckpointError(f"{file}: the configuration in its metadata is damaged ({problem})") from problem
