"""Open whatever somebody has: a file or folder of any known layout, read as its kind and its native parts."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import bases
from ..errors import CheckpointError
from . import files, foreign_json, metadata, pickled, tensors
from .detect import CHECKPOINT_PREFIXES, VAE_PREFIXES, Detected, detect
from .diffusers_names import current_vae, transformer_config, transformer_rules, vae_config, vae_rules
from .names import to_native
from .settings import Number
from .tensors import Tensors

logger = logging.getLogger(__name__)

TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")
BASE_MODELS = ("sd3 model", "sd3 checkpoint", "diffusers transformer")
OF_TRAINING = ("loss.", "model_ema.")  # before the names of what an LDM training leaves beside its VAE's tensors
KL_SCALE = 0.18215  # the scaling_factor of an AutoencoderKL whose config.json states none. Source: its constructor
_SHIFT, _SCALE = Number(-1e4, 1e4), Number(1e-6, 1e6)
_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")  # diffusers puts the variant there: .safetensors.index.fp16.json


@dataclass(frozen=True)
class Part:
    """One model out of a file or folder.

    Attributes:
        native: its tensors in native names (for a text encoder, the names of its own ComfyUI file).
        theirs: the same in diffusers' names, where that is how they are stored.
        file: where it lies, for messages.
    """

    native: Tensors
    theirs: Tensors | None
    file: str


@dataclass(frozen=True)
class Opened:
    """What a file or folder is.

    Attributes:
        path: the file that decided, or the folder.
        detected: kind and phrase.
        stored: its tensors as they are named there.
        told: the metadata of a safetensors file.
        parts: ``diffusion_model``, ``vae``, ``clip_l``, ``clip_g``, ``t5xxl``, as far as it holds them.
        content: everything in a pickled file.
        sources: the safetensors files that it is read from, and the metadata of each.
    """

    path: Path
    detected: Detected
    stored: Tensors
    told: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[Path, Mapping[str, str]] = field(default_factory=dict)


def open_any(path: Path, most: int | None = files.HASHED_AT_LOAD) -> Opened:
    """Open a file or folder, and compare its data with the hashes in it.

    Data that is not what it was saved with is refused in files of ours, as their loaders do. Of others it is said in
    the log, and they are read all the same: tools that change tensors keep old metadata.

    Args:
        path: the file or folder.
        most: leave files of more bytes uncompared, as :func:`files.check_hash` does; 0 for headers alone.

    Raises:
        CheckpointError: it cannot be read, is a folder in which nothing known lies, or a damaged file of ours.
    """
    try:
        opened = _open(path)
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read ({problem})") from problem
    for file, told in opened.sources.items():
        try:
            files.check_hash(file, told, most)
        except CheckpointError as problem:
            if metadata.kind_of(told):
                raise
            logger.warning("%s. It is read all the same: %s", problem, file)
    return opened


def _open(path: Path) -> Opened:
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() in pickled.SUFFIXES:
        return _pickled(path)
    if _INDEX.fullmatch(path.name):
        shards = sorted({path.with_name(name) for name in tensors.shard_names(path).values()})
        stored = tensors.read_shards(path)
        return _opened(path, stored, {}, {shard: files.read_metadata(shard)[1] for shard in shards})
    stored, told = tensors.read(path)
    return _opened(path, stored, told, {path: told})


def diffusion_model(path: Path) -> dict[str, torch.Tensor]:
    """An SD3 / SD3.5 diffusion model in the names of its own layout, in the file's dtype.

    Of a checkpoint only this part is read: its text encoders stay on the disk.

    Args:
        path: a diffusion model's file, a checkpoint that holds one, or a folder of diffusers' layout.

    Raises:
        CheckpointError: it cannot be read, or holds no unadapted SD3 / SD3.5 model.
    """
    opened = open_any(path)
    if opened.detected.kind not in BASE_MODELS or "diffusion_model" not in opened.parts:
        raise CheckpointError(
            f"{path.name} is {opened.detected.description}; give an unadapted SD3 / SD3.5 diffusion model, a "
            "checkpoint that holds one, or a folder of diffusers' layout (--model)"
        )
    return dict(opened.parts["diffusion_model"].native)


def _opened(path: Path, stored: Tensors, told: Mapping[str, str], sources: Mapping[Path, Mapping[str, str]]) -> Opened:
    detected = detect(stored.meta, metadata.kind_of(told))
    with files.naming(path.name):
        if detected.kind == "diffusers vae" and bases.BASE_KEY not in told:
            told = {**told, **_base_beside(path, stored)}
        return Opened(path, detected, stored, told, _parts(detected, stored, path.name), sources=sources)


def _base_beside(path: Path, stored: Tensors) -> dict[str, str]:
    """The base of a VAE in diffusers' names, by the units in the ``config.json`` beside it; as metadata.

    Raises:
        CheckpointError: its units are no numbers, or out of range.
    """
    config = path.with_name("config.json")
    if not config.is_file():
        return {}
    told = foreign_json.read(config)
    if told.get("latents_mean") or told.get("latents_std"):
        logger.warning("%s states units for each channel, which are not read; say its base with --family", config)
        return {}
    shift, scale = told.get("shift_factor"), told.get("scaling_factor")
    if scale is None and told.get("_class_name") == "AutoencoderKL":
        scale = KL_SCALE
    if scale is None:
        return {}
    with files.naming(config.name):
        units = _SHIFT.read("shift_factor", 0.0 if shift is None else shift), _SCALE.read("scaling_factor", scale)
    return {bases.BASE_KEY: bases.name_of_units(vae_config(stored.meta).latent_channels, *map(float, units))}


def _parts(detected: Detected, stored: Tensors, file: str) -> dict[str, Part]:
    if detected.kind == "diffusers transformer":
        rules = transformer_rules(transformer_config(stored.meta))
        return {"diffusion_model": Part(to_native(stored, rules, file), stored, file)}
    if detected.kind == "diffusers vae":
        theirs = current_vae(stored)
        return {"vae": Part(to_native(theirs, vae_rules(vae_config(theirs.meta)), file), theirs, file)}
    if detected.kind in ("sd3 model", "sd3 checkpoint", "model"):
        inner = {"diffusion_model": stored.below(*CHECKPOINT_PREFIXES) or stored}
        if any(name.startswith(CHECKPOINT_PREFIXES) for name in stored):
            inner["vae"] = _vae_alone(stored.below(*VAE_PREFIXES))
        for name in TEXT_ENCODERS:
            outer = stored.below(f"text_encoders.{name}.")
            inner[name] = outer.renamed({key.removeprefix("transformer."): key for key in outer})
        return {name: Part(part, None, file) for name, part in inner.items() if part}
    if detected.kind == "vae":
        return {"vae": Part(_vae_alone(stored.below(*VAE_PREFIXES) or stored), None, file)}
    return {}


def _vae_alone(stored: Tensors) -> Tensors:
    """A VAE without its training's losses and running average, which A1111 leaves out too."""
    return stored.renamed({name: name for name in stored if not name.startswith(OF_TRAINING)})


def _pickled(path: Path) -> Opened:
    content = pickled.read(path)
    inner = content.get("state_dict", content.get("model_state_dict", content))
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path.name} holds a {type(inner).__name__}, expected tensors by name")
    stored = pickled.tensors(inner, path.name)
    detected = detect(stored.meta)
    if not detected.kind.startswith("authors"):
        raise CheckpointError(
            f"{path.name} is {detected.description}, pickled. Pickled files are read of the authors' release only; "
            "take the model's .safetensors file"
        )
    return Opened(path, detected, stored, {}, {}, content)


def _folder(folder: Path) -> Opened:
    """A pipeline folder of diffusers, one of its components, or a folder of the authors' release."""
    there = [folder / name for name in ("transformer", "vae") if (folder / name).is_dir()]
    if there:
        components = [part for part in there if _has_weights(part)] or there
        found = [_component(part) for part in components]
        said = " and ".join(one.detected.description for one in found)
        said += "".join(f" ({part.name}/ holds no weights)" for part in there if part not in components)
        # Another family's transformer does not keep anybody from the VAE beside it.
        pairs = [(one, part) for one, part in zip(found, components, strict=True) if one.parts]
        odd = next((one for one in found if not one.parts), None)
        if odd is not None and not (pairs and odd is found[0]):
            raise CheckpointError(f"{odd.path} is {odd.detected.description}, expected a component of SD3")
        parts = {name: part for one, _ in pairs for name, part in one.parts.items()}
        stored = tensors.joined(
            one.stored.renamed({f"{part.name}.{name}": name for name in one.stored}) for one, part in pairs
        )
        kind = "sd3 checkpoint" if len(pairs) == 2 else pairs[0][0].detected.kind
        named = dict(entry for one, _ in pairs for entry in one.told.items() if entry[0] == bases.BASE_KEY)
        sources = {file: told for one, _ in pairs for file, told in one.sources.items()}
        phrase = f"a diffusers folder with {said}"
        return Opened(folder, Detected(kind, phrase), stored, named, parts, sources=sources)
    return _component(folder)


def _has_weights(folder: Path) -> bool:
    """Whether any of a component's weights are there: of a download in parts there may be an index alone, or less."""
    file = _weights(folder)
    if file is None or not _INDEX.fullmatch(file.name):
        return file is not None
    return any((folder / name).is_file() for name in set(tensors.shard_names(file).values()))


def _component(folder: Path) -> Opened:
    file = _weights(folder)
    if file is None:
        raise CheckpointError(
            f"{folder} holds no weights that are known here. Expected a diffusers folder (transformer/, vae/ with "
            "*.safetensors), or of the authors' release pytorch_model.bin or latest.pt"
        )
    return _open(file)


def _weights(folder: Path) -> Path | None:
    """The file that holds a component's weights, or the index of such files; None where there is none.

    Raises:
        CheckpointError: there are several, and nothing tells which is meant.
    """
    for pattern in (
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
        "*.safetensors.index.json",
        "*.safetensors.index.*.json",
        "pytorch_model.bin",
        "latest.pt",
        "tokenizer_checkpoints/latest.pt",
        "*.safetensors",
        "*.sft",
    ):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(
                f"{folder} holds {len(found)} files like {pattern}: {', '.join(file.name for file in found[:4])}; name "
                "the one that is meant"
            )
        if found:
            return found[0]
    return None
