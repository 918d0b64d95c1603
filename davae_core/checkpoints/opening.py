"""Open whatever somebody has: a file or folder of any known layout, read as its kind and its native parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import bases
from ..errors import CheckpointError
from . import files, foreign_json, metadata, pickled, tensors
from .detect import CHECKPOINT_PREFIXES, VAE_PREFIXES, Detected, detect
from .diffusers_names import transformer_config, transformer_rules, vae_config, vae_rules
from .names import to_native
from .tensors import Tensors

TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")
BASE_MODELS = ("sd3 model", "sd3 checkpoint", "diffusers transformer")


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
    """

    path: Path
    detected: Detected
    stored: Tensors
    told: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)


def open_any(path: Path) -> Opened:
    """Open a file or folder.

    Raises:
        CheckpointError: it cannot be read, or is a folder in which nothing known lies.
    """
    try:
        if path.is_dir():
            return _folder(path)
        if path.suffix.lower() in pickled.SUFFIXES:
            return _pickled(path)
        if path.name.endswith(".index.json"):
            return _opened(path, tensors.read_shards(path), {})
        return _opened(path, *tensors.read(path))
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read ({problem})") from problem


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


def _opened(path: Path, stored: Tensors, told: Mapping[str, str]) -> Opened:
    detected = detect(stored.meta, metadata.kind_of(told))
    with files.naming(path.name):
        if detected.kind == "diffusers vae" and bases.BASE_KEY not in told:
            told = {**told, **_base_beside(path, stored)}
        return Opened(path, detected, stored, told, _parts(detected, stored, path.name))


def _base_beside(path: Path, stored: Tensors) -> dict[str, str]:
    """Which base a VAE in diffusers' names is of, by the units in the ``config.json`` beside it; as metadata."""
    config = path.with_name("config.json")
    if not config.is_file():
        return {}
    told = foreign_json.read(config)
    channels = vae_config(stored.meta).latent_channels
    base = bases.of_units(channels, told.get("shift_factor") or 0.0, told.get("scaling_factor"))
    return {bases.BASE_KEY: base.name} if base else {}


def _parts(detected: Detected, stored: Tensors, file: str) -> dict[str, Part]:
    if detected.kind == "diffusers transformer":
        rules = transformer_rules(transformer_config(stored.meta))
        return {"diffusion_model": Part(to_native(stored, rules, file), stored, file)}
    if detected.kind == "diffusers vae":
        return {"vae": Part(to_native(stored, vae_rules(vae_config(stored.meta)), file), stored, file)}
    if detected.kind in ("sd3 model", "sd3 checkpoint", "model"):
        inner = {"diffusion_model": stored.below(*CHECKPOINT_PREFIXES) or stored}
        if any(name.startswith(CHECKPOINT_PREFIXES) for name in stored):
            inner["vae"] = stored.below(*VAE_PREFIXES)
        for name in TEXT_ENCODERS:
            outer = stored.below(f"text_encoders.{name}.")
            inner[name] = outer.renamed({key.removeprefix("transformer."): key for key in outer})
        return {name: Part(part, None, file) for name, part in inner.items() if part}
    if detected.kind == "vae":
        return {"vae": Part(stored.below(*VAE_PREFIXES) or stored, None, file)}
    return {}


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
    components = [folder / name for name in ("transformer", "vae") if (folder / name).is_dir()]
    if components:
        found = [_component(part) for part in components]
        said = " and ".join(one.detected.description for one in found)
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
        return Opened(folder, Detected(kind, f"a diffusers folder with {said}"), stored, named, parts)
    return _component(folder)


def _component(folder: Path) -> Opened:
    for pattern in (
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
        "*.safetensors.index.json",
        "pytorch_model.bin",
        "latest.pt",
        "tokenizer_checkpoints/latest.pt",
        "*.safetensors",
    ):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(
                f"{folder} holds {len(found)} files like {pattern}: {', '.join(file.name for file in found[:4])}; name "
                "the one that is meant"
            )
        if found:
            return open_any(found[0])
    raise CheckpointError(
        f"{folder} holds no weights that are known here. Expected a diffusers folder (transformer/, vae/ with "
        "*.safetensors), or of the authors' release pytorch_model.bin or latest.pt"
    )
