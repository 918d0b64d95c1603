"""LoRA files of diffusers and PEFT, read into an adapter's LoRA tensors and written for them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, quoted
from ..lora import LORA_MODULES
from . import files, foreign_json, layout, pickled, tensors
from .settings import Number
from .tensors import Tensors

WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
METADATA = "lora_adapter_metadata"  # diffusers writes the LoRA's configuration under this key
STEM = "transformer.transformer_blocks."

_NAME = re.compile(r"(?:.*\.)?transformer_blocks\.(\d+)\.(.+)\.lora_(A|B|down|up)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"(?:.*\.)?transformer_blocks\.(\d+)\.(.+)\.alpha")
_PLAIN = re.compile(r"[\w.]{1,200}")
_MOST_PATTERNS = 16384
ALPHA = Number(-1e6, 1e6)
_FACTOR = {"A": "A", "B": "B", "down": "A", "up": "B"}


@dataclass(frozen=True)
class LoraScale:
    """How strongly a LoRA counts: ``alpha / rank``, as PEFT's configuration says.

    Attributes:
        alpha: of every module; None for the module's rank.
        alphas: by a module's name or the end of it, before ``alpha``.
        rank_stabilised: the factor is ``alpha / sqrt(rank)``.
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def of(self, module: str, rank: int) -> float:
        """The alpha by which ``alpha / rank`` is the factor of this module."""
        parts = module.split(".")
        named = [key for i in range(len(parts)) if (key := ".".join(parts[i:])) in self._order]
        told = self.alphas[min(named, key=self._order.__getitem__)] if named else self.alpha  # as PEFT: the first
        alpha = float(rank) if told is None else told
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha

    @cached_property
    def _order(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self.alphas)}


def find(folder: Path) -> Path:
    """The LoRA file in a folder; a file is its own.

    Raises:
        CheckpointError: there is none, or several.
    """
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; name the folder or file of the LoRA")
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    found = named[:1] or sorted(file for file in folder.iterdir() if files.is_safetensors(file))
    found = found or sorted(folder.glob("*.bin"))
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} LoRA files, expected one, such as {WEIGHTS[0]}; name the file itself"
        )
    return found[0]


def read(path: Path) -> dict[str, torch.Tensor]:
    """A LoRA in the names of an adapter: ``transformer.transformer_blocks.N.MODULE.lora_A.weight | lora_B | alpha``.

    Args:
        path: a file of diffusers or PEFT, or the folder that holds it and maybe an ``adapter_config.json``.

    Raises:
        CheckpointError: it cannot be read, or holds what an adapter cannot: DoRA, biases, other modules.
    """
    file = find(path)
    told: Mapping[str, str] = {}
    if file.suffix in pickled.SUFFIXES:
        source = pickled.tensors(pickled.read(file), file.name)
    else:
        source, told = tensors.read(file)
    config = file.with_name("adapter_config.json")
    settings: dict[str, Any] = {}
    if config.is_file():
        settings = foreign_json.read(config)
    elif METADATA in told:
        settings = foreign_json.parse(told[METADATA], f"{file.name}: its LoRA configuration")
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    return renamed(source, _scale(settings, file.name), file.name)


def _scale(settings: Mapping[str, Any], file: str) -> LoraScale:
    if settings.get("use_dora") or settings.get("lora_bias") or settings.get("bias", "none") != "none":
        raise CheckpointError(f"{file} is a LoRA with DoRA or biases, which an adapter cannot hold; merge it instead")
    try:
        alpha = settings.get("lora_alpha")
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
            raise CheckpointError(f"alpha_pattern is no list of at most {_MOST_PATTERNS} modules with an alpha each")
        return LoraScale(
            None if alpha is None else float(ALPHA.read("lora_alpha", alpha)),
            {_module(key): float(ALPHA.read("alpha_pattern", value)) for key, value in patterns.items()},
            bool(settings.get("use_rslora")),
        )
    except CheckpointError as problem:
        raise CheckpointError(f"{file}: its LoRA configuration cannot be used: {problem}") from problem


def _module(pattern: str) -> str:
    """A key of ``alpha_pattern`` as a module's name: PEFT takes it for a regular expression, which may never end."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not _PLAIN.fullmatch(name):
        raise CheckpointError(f"alpha_pattern names {quoted(pattern)}, expected names of modules, not patterns")
    return name


def renamed(source: Tensors, scale: LoraScale, file: str) -> dict[str, torch.Tensor]:
    """LoRA tensors in any spelling of diffusers' and PEFT's names, as :func:`read` returns them; others are refused."""
    state: dict[str, torch.Tensor] = {}
    layout.check_floats({name: meta for name, meta in source.meta.items() if not name.endswith(".alpha")}, file)
    for name, meta in source.meta.items():
        if (meta.numel() != 1) if name.endswith(".alpha") else (meta.ndim != 2 or not meta.numel()):
            raise CheckpointError(f"{file}: {name} has shape {list(meta.shape)}, which is no part of a LoRA")
        if match := _NAME.fullmatch(name):
            state[f"{STEM}{match[1]}.{_known(match[2], name, file)}.lora_{_FACTOR[match[3]]}.weight"] = source[name]
        elif match := _ALPHA.fullmatch(name):
            state[f"{STEM}{match[1]}.{_known(match[2], name, file)}.alpha"] = source[name].float()
        else:
            raise CheckpointError(f"{file}: {name} is no LoRA tensor of diffusers' SD3 transformer")
    for name in list(state):
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            module = stem.removeprefix("transformer.")
            state.setdefault(f"{stem}.alpha", torch.tensor(scale.of(module, state[name].shape[0])))
    return state


def _known(module: str, name: str, file: str) -> str:
    if module not in LORA_MODULES:
        raise CheckpointError(
            f"{file}: the LoRA changes {name.split('.lora_')[0]}, which an adapter cannot; it can change "
            f"{', '.join(LORA_MODULES)} of each block"
        )
    return module


def for_diffusers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's LoRA with alpha multiplied into the second factor: diffusers reads no alpha, and takes the rank."""
    out = {}
    for name, tensor in state.items():
        if name.endswith(".lora_A.weight"):
            out[name] = tensor
        elif name.endswith(".lora_B.weight"):
            alpha = state.get(name.replace(".lora_B.weight", ".alpha"))
            factor = 1.0 if alpha is None else float(alpha) / tensor.shape[1]
            out[name] = tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)
    return out
