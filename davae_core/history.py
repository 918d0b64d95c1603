"""Where a trained file comes from: how it was trained, and which models it belongs to.

A model is known again by a few of its values (:func:`fingerprint`), compared with a tolerance: the same model in
float32, float16 or bfloat16 and in any layout has the same ones up to rounding, where a hash would differ. About a
hundred values are read, so that it costs milliseconds at any size.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Role = Literal["base_vae", "davae", "base_model", "adapted_model", "start"]
ROLES: tuple[Role, ...] = ("base_vae", "davae", "base_model", "adapted_model", "start")
Fingerprint = Mapping[str, tuple[float, ...]]

SAMPLES = 4  # values of each tensor
ROUNDING = 0.01  # of a tensor's largest sample: more than bfloat16 (0.4 %) and float16 round away, less than training
SMALLEST = 1e-5  # below, float16 keeps few digits: differences count as parts of this
ENOUGH = 4  # tensors that both must have, to tell anything

_ENCODER = (
    "conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias", "norm_out.weight", "norm_out.bias",
    "mid.block_1.conv1.weight", "mid.attn_1.q.weight", "mid.block_2.norm2.bias",
    *(f"down.{i}.block.0.{part}" for i in range(5) for part in ("norm1.weight", "conv1.weight", "conv2.bias")),
)  # fmt: skip
_BASE_VAE = (*(f"encoder.{name}" for name in _ENCODER), "quant_conv.weight")
_DETAIL = (
    *(f"detail_trunk.{name}" for name in _ENCODER),
    *(f"detail_down.{name}" for name in ("conv.weight", "conv.bias", "shortcut.weight")),
)
# The embedder and the head are not among them, which an adapter replaces.
_BASE_MODEL = (
    "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight", "y_embedder.mlp.0.weight", "context_embedder.weight",
    "context_embedder.bias", "final_layer.adaLN_modulation.1.bias",
    *(
        f"joint_blocks.{i}.{part}"
        for i in (0, 1, 3, 7, 11, 17, 23, 37)
        for part in (
            "x_block.attn.qkv.weight", "x_block.attn.qkv.bias", "x_block.attn.proj.weight", "x_block.mlp.fc2.weight",
            "context_block.attn.qkv.bias",
        )
    ),
)  # fmt: skip
# All of them are an adapter's doing, and in every adapted model, whatever else was put on it.
_ADAPTED_MODEL = (
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
)
_PREDICTOR = tuple(f"predictor.{name}" for name in ("conv_in.weight", "conv_out.weight", "conv_out.bias"))
NAMES: Mapping[str, tuple[str, ...]] = {
    "adapted_model": _ADAPTED_MODEL,
    "base_vae": _BASE_VAE,
    "davae": (*_BASE_VAE, *_DETAIL, *_PREDICTOR),
    "base_model": _BASE_MODEL,
}


@dataclass(frozen=True)
class Identity:
    """A model that a file belongs to.

    Attributes:
        name: for people: its file's name or title.
        values: see :func:`fingerprint`; empty where it is known by its name alone.
    """

    name: str
    values: Fingerprint = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """How a file was made.

    Attributes:
        steps: optimiser steps.
        learning_rate: the highest.
        seed: random seed.
        recipe: name of the recipe.
        settings: the flat recipe, ``{"optimiser.lr": 1e-4, ...}``; JSON values.
        of: the models it belongs to or was started from, by role.
    """

    steps: int = 0
    learning_rate: float = 0.0
    seed: int = 0
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    of: Mapping[Role, Identity] = field(default_factory=dict)


def identity(role: Role, state: Mapping[str, torch.Tensor], name: str) -> Identity:
    """A model as something that a file can belong to; arguments as for :func:`fingerprint`."""
    return Identity(name, fingerprint(role, state))


def fingerprint(role: Role, state: Mapping[str, torch.Tensor]) -> Fingerprint:
    """A few values of a model, by the name of their tensor.

    Args:
        role: ``base_vae`` (its encoder, which makes the latents; a finetuned decoder is the same base), ``davae`` (its
            encoders and the predictor inside, for the same reason), ``base_model`` or ``adapted_model`` (the embedder
            and the head).
        state: native names, without a prefix. A DA-VAE's tensors serve for its base VAE, too. A lazy mapping is read
            only where it is needed.

    Returns:
        :data:`SAMPLES` values of each tensor; tensors that are quantised to 8 bits or less, or not there, are left out.
    """
    found: dict[str, tuple[float, ...]] = {}
    for name in NAMES.get(role, ()):
        ours = name.replace("encoder.", "base_encoder.", 1) if name.startswith("encoder.") else f"base_{name}"
        key = next((key for key in (name, ours) if key in state), None)
        if key is not None and (values := _sampled(state[key])):
            found[name] = values
    return found


def _sampled(tensor: torch.Tensor) -> tuple[float, ...]:
    if tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
        return ()
    places = [(2 * i + 1) * tensor.numel() // (2 * SAMPLES) for i in range(SAMPLES)]
    values = tensor.detach().flatten()[torch.tensor(places, device=tensor.device)].float().tolist()
    return tuple(float(f"{value:.5g}") for value in values) if all(map(math.isfinite, values)) else ()


@dataclass(frozen=True)
class Likeness:
    """Two fingerprints beside each other: ``differing`` of ``compared`` tensors are not the same up to rounding."""

    differing: int
    compared: int

    @property
    def same(self) -> bool:
        """Whether nothing speaks against it; also where too little could be compared to tell."""
        return self.compared < ENOUGH or not self.differing


def compare(one: Fingerprint, other: Fingerprint) -> Likeness:
    """How much alike two models are, over the tensors that both fingerprints hold; a predictor that only one of two
    DA-VAEs has inside makes another latent."""
    common = [name for name in one if name in other and len(one[name]) == len(other[name])]
    differing = [name for name in common if _differ(one[name], other[name])]
    lonely = [name for name in one.keys() ^ other.keys() if name in _PREDICTOR] if len(common) >= ENOUGH else []
    return Likeness(len(differing) + len(lonely), len(common) + len(lonely))


def _differ(one: Iterable[float], other: Iterable[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    scale = max(SMALLEST, *(abs(value) for pair in pairs for value in pair))
    return any(abs(a - b) > ROUNDING * scale for a, b in pairs)


def mismatch(history: History | None, role: Role, state: Mapping[str, torch.Tensor]) -> str:
    """What to tell people where a file meets another model than its own: "trained on ..., this is ..."; "" if not so.

    Args:
        history: of the file; None, or without that role, for files that do not tell.
        role, state: the model that it meets, as for :func:`fingerprint`.
    """
    told = history.of.get(role) if history else None
    if told is None or not told.values:
        return ""
    likeness = compare(told.values, fingerprint(role, state))
    if likeness.same:
        return ""
    return (
        f"trained on {told.name or 'a model without a name'}, this is another (other values in {likeness.differing} of "
        f"{likeness.compared} tensors compared)"
    )
