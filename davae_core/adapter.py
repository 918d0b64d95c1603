"""From C to C + D channels: a wider patch embedder and head for a pretrained MMDiT, and LoRA on its trunk.

Source: arXiv 2603.22125 sec. 3.2. The pretrained embedder P and head O stay; a new embedder P' for the detail channels
is added to P's output, and a new head O' for them is joined to O's per token. P' and O' start at zero, so that at
step 0 the model is the pretrained one on the base channels and predicts 0 on the detail channels.

An adapter's tensors:

    davae.x_embedder.proj.detail.weight       P'           [hidden, D, patch, patch]
    davae.x_embedder.proj.delta.weight|bias   change of P  [hidden, C, patch, patch] | [hidden]                optional
    davae.final_layer.linear.detail.weight|bias  O'        [patch^2 D, hidden] | [patch^2 D]
    davae.final_layer.linear.delta.weight|bias   change of O  [patch^2 C, hidden] | [patch^2 C]                optional
    transformer.transformer_blocks.N.MODULE.lora_A.weight | lora_B.weight | alpha   LoRA, named as diffusers does

Rows of a head are [token position, channel], channel innermost, in the SD3.5 layout.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .bases import MMDIT
from .errors import CheckpointError, DAVAEError
from .history import History
from .latent import LatentSpec
from .mmdit import MMDiTConfig
from .shapes import dims

PREFIX = "davae."
EMBED, HEAD = MMDIT.embedder, MMDIT.head
WIDENED = (f"{EMBED}weight", f"{EMBED}bias", f"{HEAD}weight", f"{HEAD}bias")

# LoRA module name (diffusers) -> weight in the SD3.5 layout, and which third of a fused projection it is.
LORA_MODULES = dict(MMDIT.lora_modules)
PAPER_TARGETS = MMDIT.lora_targets

# Features of a LoRA module, in parts of the model's width: (out, several where blocks differ), in.
_FEATURES: dict[str, tuple[tuple[int, ...], int]] = {
    "norm1.linear": ((6, 9), 1),
    "ff.net.0.proj": ((4,), 1),
    "ff_context.net.0.proj": ((4,), 1),
    "ff.net.2": ((1,), 4),
    "ff_context.net.2": ((1,), 4),
}

_BLOCK = re.escape(MMDIT.lora_block).replace(r"\{\}", r"(\d+)")
_LORA_NAME = re.compile(rf"({_BLOCK}(.+))\.(lora_A\.weight|lora_B\.weight|alpha)")


@dataclass(frozen=True)
class Recommended:
    """How the adapter was trained to be sampled; 0 where it says nothing.

    Attributes:
        size: image side in pixels.
        shift: time shift of the flow.
        cfg: guidance scale.
        steps: sampling steps.
    """

    size: int = 0
    shift: float = 0.0
    cfg: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter fits.

    Attributes:
        latent: the latent it makes the model speak, with the statistics it was trained with.
        hidden, patch: of the MMDiT it belongs to.
        recommended: sampling settings.
    """

    latent: LatentSpec
    hidden: int
    patch: int = 2
    recommended: Recommended = Recommended()

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, torch.Tensor], base_channels: int = LatentSpec.base_channels
    ) -> "AdapterConfig":
        """Read what the shapes tell: hidden, patch, D, and C where there is a change of P.

        Args:
            state: tensors by name.
            base_channels: C where the shapes do not tell.

        Raises:
            CheckpointError: the tensors of an adapter are not there.
        """
        try:
            hidden, detail, patch, _ = dims(state, f"{PREFIX}{EMBED}detail.weight", 4)
            rows, _ = dims(state, f"{PREFIX}{HEAD}detail.weight", 2)
            (bias,) = dims(state, f"{PREFIX}{HEAD}detail.bias", 1)
            delta = f"{PREFIX}{EMBED}delta.weight"
            base = dims(state, delta, 4)[1] if delta in state else base_channels
        except CheckpointError as problem:
            raise CheckpointError(f"not a DA-VAE adapter: {problem}") from problem
        if rows != patch**2 * detail or bias != rows:
            raise CheckpointError(
                f"damaged adapter: its embedder is for {detail} detail channels, its head for {rows / patch**2:g} "
                f"(bias: {bias / patch**2:g})"
            )
        wanted = {
            f"{PREFIX}{EMBED}detail.weight": (hidden, detail, patch, patch),
            f"{PREFIX}{HEAD}detail.weight": (rows, hidden),
            f"{PREFIX}{HEAD}detail.bias": (rows,),
            f"{PREFIX}{EMBED}delta.weight": (hidden, base, patch, patch),
            f"{PREFIX}{EMBED}delta.bias": (hidden,),
            f"{PREFIX}{HEAD}delta.weight": (patch**2 * base, hidden),
            f"{PREFIX}{HEAD}delta.bias": (patch**2 * base,),
        }
        for name, shape in wanted.items():
            if name in state and tuple(state[name].shape) != shape:
                raise CheckpointError(f"damaged adapter: {name} is {list(state[name].shape)}, expected {list(shape)}")
        unknown = [name for name in state if name.startswith(PREFIX) and name not in wanted]
        if unknown:
            raise CheckpointError(f"unknown tensor in the adapter: {unknown[0]}")
        _check_lora(state, hidden)
        return cls(latent=LatentSpec(base_channels=base, detail_channels=detail), hidden=hidden, patch=patch)


@dataclass(frozen=True)
class Adapter:
    """An adapter: configuration, tensors under the names listed at the top of this file, and history if known."""

    config: AdapterConfig
    state: dict[str, torch.Tensor]
    history: History | None = None

    def lora_state(self) -> dict[str, torch.Tensor]:
        """The LoRA tensors alone, named as diffusers and ComfyUI know them."""
        return {name: tensor for name, tensor in self.state.items() if not name.startswith(PREFIX)}


def zero_adapter(
    model: MMDiTConfig,
    latent: LatentSpec,
    rank: int = 0,
    targets: tuple[str, ...] = PAPER_TARGETS,
    generator: torch.Generator | None = None,
) -> Adapter:
    """The adapter of step 0: P', O' and every LoRA product are zero, so the model is unchanged.

    Args:
        model: the pretrained model.
        latent: the latent to adapt to; its base channels must be the model's.
        rank: LoRA rank (and alpha); 0 for no LoRA.
        targets: keys of :data:`LORA_MODULES`.
        generator: draws the LoRA's first factors, normal with standard deviation 1 / rank as in the release.
    """
    if model.in_channels != latent.base_channels or model.out_channels != latent.base_channels:
        raise DAVAEError(
            f"the model has {model.in_channels} channels in and {model.out_channels} out, expected the latent's "
            f"{latent.base_channels} base channels"
        )
    detail, tokens, hidden = latent.detail_channels, model.patch**2, model.hidden
    state = {
        f"{PREFIX}{EMBED}detail.weight": torch.zeros(hidden, detail, model.patch, model.patch),
        f"{PREFIX}{EMBED}delta.weight": torch.zeros(hidden, latent.base_channels, model.patch, model.patch),
        f"{PREFIX}{EMBED}delta.bias": torch.zeros(hidden),
        f"{PREFIX}{HEAD}detail.weight": torch.zeros(tokens * detail, hidden),
        f"{PREFIX}{HEAD}detail.bias": torch.zeros(tokens * detail),
        f"{PREFIX}{HEAD}delta.weight": torch.zeros(tokens * latent.base_channels, hidden),
        f"{PREFIX}{HEAD}delta.bias": torch.zeros(tokens * latent.base_channels),
    }
    for block in range(model.depth if rank else 0):
        for module in targets:
            if module.startswith("attn2.") and block not in model.dual_attention:
                continue
            if module in MMDIT.not_in_the_last_block and block == model.depth - 1:
                continue
            out_features, in_features = _module_shape(module, model, block)
            name = f"{MMDIT.lora_block.format(block)}{module}"
            first = torch.empty(rank, in_features)
            state[f"{name}.lora_A.weight"] = first.normal_(std=1 / rank, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.zeros(out_features, rank)
            state[f"{name}.alpha"] = torch.tensor(float(rank))
    return Adapter(AdapterConfig(latent, model.hidden, model.patch), state)


def _module_shape(module: str, model: MMDiTConfig, block: int) -> tuple[int, int]:
    """(out, in) features of a LoRA module."""
    if module not in LORA_MODULES:
        raise DAVAEError(f"unknown LoRA module {module!r}, expected one of {', '.join(LORA_MODULES)}")
    outs, features = _FEATURES.get(module, ((1,), 1))
    return outs[block in model.dual_attention if len(outs) > 1 else 0] * model.hidden, features * model.hidden


def check_fits(adapter: AdapterConfig, embedder: tuple[int, ...], head: tuple[int, ...]) -> None:
    """Raise DAVAEError unless the adapter fits a model whose embedder and head weights have these shapes."""
    hidden, channels, patch, _ = embedder
    spec = adapter.latent
    if (hidden, patch) != (adapter.hidden, adapter.patch):
        raise DAVAEError(
            f"this adapter is for a model of width {adapter.hidden} with patches of {adapter.patch}, but the MODEL has "
            f"width {hidden} and patches of {patch}; use the model it was trained for"
        )
    if channels != spec.base_channels or head[0] != patch**2 * spec.base_channels:
        raise DAVAEError(
            f"this adapter is for a model with {spec.base_channels} latent channels, but the MODEL reads {channels} "
            f"and predicts {head[0] // patch**2}; use an unadapted model"
        )


def widen(base: Mapping[str, torch.Tensor], adapter: Adapter, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The embedder and head for C + D channels, fused into one convolution and one linear layer.

    Args:
        base: the pretrained tensors named in :data:`WIDENED`.
        adapter: what to add.
        strength: factor on the changes of P and O; P' and O' always count in full, for a weakened head would leave
            noise in the detail channels.

    Returns:
        The tensors of :data:`WIDENED`, in the dtype and on the device of ``base``:
        ``[hidden, C + D, patch, patch]``, ``[hidden]``, ``[patch^2 (C + D), hidden]``, ``[patch^2 (C + D)]``.
    """
    check_fits(adapter.config, tuple(base[WIDENED[0]].shape), tuple(base[WIDENED[2]].shape))
    positions = adapter.config.patch**2

    def changed(name: str, part: str) -> torch.Tensor:
        delta = adapter.state.get(f"{PREFIX}{name}delta.{part}")
        tensor = base[f"{name}{part}"]
        return (
            tensor if delta is None else (tensor.float() + strength * delta.to(tensor.device).float()).to(tensor.dtype)
        )

    def per_token(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (positions, -1))

    new = {name: adapter.state[f"{PREFIX}{name}"] for name in (f"{EMBED}detail.weight", f"{HEAD}detail.weight")}
    new[f"{HEAD}detail.bias"] = adapter.state[f"{PREFIX}{HEAD}detail.bias"]
    wide = {
        f"{EMBED}weight": torch.cat(
            [changed(EMBED, "weight"), new[f"{EMBED}detail.weight"].to(base[WIDENED[0]])], dim=1
        ),
        f"{EMBED}bias": changed(EMBED, "bias"),
    }
    for part in ("weight", "bias"):
        detail = new[f"{HEAD}detail.{part}"].to(base[f"{HEAD}{part}"])
        wide[f"{HEAD}{part}"] = torch.cat([per_token(changed(HEAD, part)), per_token(detail)], dim=1).flatten(0, 1)
    return wide


def _lora_stems(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, str]]:
    """Block and module of every LoRA, by the name that its tensors start with.

    Raises:
        CheckpointError: a tensor is of no known module, or one of a LoRA's two factors is missing.
    """
    stems: dict[str, tuple[int, str]] = {}
    for name in state:
        if name.startswith(PREFIX):
            continue
        match = _LORA_NAME.fullmatch(name)
        if match is None or match.group(3) not in LORA_MODULES:
            raise CheckpointError(f"unknown tensor in the adapter: {name}")
        stems[match.group(1)] = (int(match.group(2)), match.group(3))
    for stem in stems:
        for factor in ("lora_A", "lora_B"):
            if f"{stem}.{factor}.weight" not in state:
                raise CheckpointError(f"damaged adapter: {stem}.{factor}.weight is not there")
        down, up = (state[f"{stem}.{factor}.weight"].shape for factor in ("lora_A", "lora_B"))
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise CheckpointError(f"damaged adapter: {stem} has factors of shapes {list(down)} and {list(up)}")
    return stems


def _check_lora(state: Mapping[str, torch.Tensor], hidden: int) -> None:
    """Raise CheckpointError unless every LoRA fits its module in a model of this width."""
    for stem, (_, module) in _lora_stems(state).items():
        outs, features = _FEATURES.get(module, ((1,), 1))
        down, up = (state[f"{stem}.lora_{factor}.weight"].shape for factor in "AB")
        if down[1] != features * hidden or up[0] not in [out * hidden for out in outs] or not down[0]:
            raise CheckpointError(
                f"damaged adapter: {stem} has factors of shapes {list(down)} and {list(up)}, expected [rank, "
                f"{features * hidden}] and [{' or '.join(str(out * hidden) for out in outs)}, rank] for a model of "
                f"width {hidden}"
            )
        alpha = state.get(f"{stem}.alpha")
        if alpha is not None and alpha.numel() != 1:
            raise CheckpointError(f"damaged adapter: {stem}.alpha holds {alpha.numel()} numbers, expected one")


def lora_deltas(adapter: Adapter) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """Each LoRA product as (weight name in the SD3.5 layout, third of a fused projection or None, ``[out, in]``)."""
    for stem, (block, module) in _lora_stems(adapter.state).items():
        down, up = (adapter.state[f"{stem}.lora_{factor}.weight"].float() for factor in "AB")
        alpha = adapter.state.get(f"{stem}.alpha")
        factor = 1.0 if alpha is None else float(alpha) / down.shape[0]
        weight, third = LORA_MODULES[module]
        yield f"{MMDIT.block.format(block)}{weight}.weight", third, factor * (up @ down)


def merge(base: Mapping[str, torch.Tensor], adapter: Adapter, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """A whole adapted model in one state dict: wider embedder and head, LoRA folded into the trunk.

    Args:
        base: the pretrained diffusion model's state dict; it is not changed, and untouched tensors are shared.
        adapter: what to apply.
        strength: factor on what the adapter changes in the pretrained weights, see :func:`widen`.
    """
    merged = dict(base) | widen(base, adapter, strength)
    for name, third, delta in lora_deltas(adapter):
        if name not in base:
            raise DAVAEError(
                f"the adapter changes {name}, which the model does not have; use the model it was trained for"
            )
        weight = merged[name].clone() if merged[name] is base[name] else merged[name]
        rows = weight if third is None else weight.chunk(3)[third]
        if rows.shape != delta.shape:
            raise DAVAEError(f"the adapter's change of {name} is {list(delta.shape)}, expected {list(rows.shape)}")
        rows.copy_(rows.float() + strength * delta.to(rows.device))
        merged[name] = weight
    return merged
