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

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .bases import MMDIT
from .errors import CheckpointError, DAVAEError
from .history import History
from .latent import LatentSpec
from .lora import NOT_LORA, add_lora, check_lora, module_shape
from .mmdit import MMDiTConfig
from .shapes import dims

PREFIX = NOT_LORA
EMBED, HEAD = MMDIT.embedder, MMDIT.head
WIDENED = (f"{EMBED}weight", f"{EMBED}bias", f"{HEAD}weight", f"{HEAD}bias")

PAPER_TARGETS = MMDIT.lora_targets


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
        check_lora(state, hidden)
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
            out_features, in_features = module_shape(module, model, block)
            name = f"{MMDIT.lora_block.format(block)}{module}"
            first = torch.empty(rank, in_features)
            state[f"{name}.lora_A.weight"] = first.normal_(std=1 / rank, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.zeros(out_features, rank)
            state[f"{name}.alpha"] = torch.tensor(float(rank))
    return Adapter(AdapterConfig(latent, model.hidden, model.patch), state)


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


def merge(base: Mapping[str, torch.Tensor], adapter: Adapter, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """A whole adapted model in one state dict: wider embedder and head, LoRA folded into the trunk.

    Args:
        base: the pretrained diffusion model's state dict; it is not changed, and untouched tensors are shared.
        adapter: what to apply.
        strength: factor on what the adapter changes in the pretrained weights, see :func:`widen`.
    """
    return add_lora(dict(base) | widen(base, adapter, strength), adapter.state, strength)
