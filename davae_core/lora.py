"""LoRA of an MMDiT's trunk in diffusers' names: which layers it may change, whether it is whole, what it adds.

transformer.transformer_blocks.N.MODULE.lora_A.weight   [rank, in]
transformer.transformer_blocks.N.MODULE.lora_B.weight   [out, rank]
transformer.transformer_blocks.N.MODULE.alpha           the product counts alpha / rank; 1 where there is none
"""

import re
from collections.abc import Iterator, Mapping

import torch

from .bases import MMDIT
from .errors import CheckpointError, DAVAEError
from .mmdit import MMDiTConfig

NOT_LORA = "davae."  # how the other tensors of an adapter begin

# LoRA module name (diffusers) -> weight in the SD3.5 layout, and which third of a fused projection it is.
LORA_MODULES = dict(MMDIT.lora_modules)

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


def module_shape(module: str, model: MMDiTConfig, block: int) -> tuple[int, int]:
    """(out, in) features of a LoRA module."""
    if module not in LORA_MODULES:
        raise DAVAEError(f"unknown LoRA module {module!r}, expected one of {', '.join(LORA_MODULES)}")
    outs, features = _FEATURES.get(module, ((1,), 1))
    return outs[block in model.dual_attention if len(outs) > 1 else 0] * model.hidden, features * model.hidden


def _lora_stems(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, str]]:
    """Block and module of every LoRA, by the name that its tensors start with.

    Raises:
        CheckpointError: a tensor is of no known module, or one of a LoRA's two factors is missing.
    """
    stems: dict[str, tuple[int, str]] = {}
    for name in state:
        if name.startswith(NOT_LORA):
            continue
        match = _LORA_NAME.fullmatch(name)
        if match is None or match.group(3) not in LORA_MODULES:
            raise CheckpointError(f"unknown LoRA tensor: {name}")
        stems[match.group(1)] = (int(match.group(2)), match.group(3))
    for stem in stems:
        for factor in ("lora_A", "lora_B"):
            if f"{stem}.{factor}.weight" not in state:
                raise CheckpointError(f"damaged LoRA: {stem}.{factor}.weight is not there")
        down, up = (state[f"{stem}.{factor}.weight"].shape for factor in ("lora_A", "lora_B"))
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise CheckpointError(f"damaged LoRA: {stem} has factors of shapes {list(down)} and {list(up)}")
    return stems


def lora_width(state: Mapping[str, torch.Tensor]) -> int:
    """Width of the model that a LoRA is for.

    Raises:
        CheckpointError: it holds no LoRA of an SD3.5 model.
    """
    for stem, (_, module) in _lora_stems(state).items():
        _, features = _FEATURES.get(module, ((1,), 1))
        return state[f"{stem}.lora_A.weight"].shape[1] // features
    raise CheckpointError("it holds no LoRA of an SD3.5 model")


def check_lora(state: Mapping[str, torch.Tensor], hidden: int) -> None:
    """Raise CheckpointError unless every LoRA fits its module in a model of this width."""
    for stem, (_, module) in _lora_stems(state).items():
        outs, features = _FEATURES.get(module, ((1,), 1))
        down, up = (state[f"{stem}.lora_{factor}.weight"].shape for factor in "AB")
        if down[1] != features * hidden or up[0] not in [out * hidden for out in outs] or not down[0]:
            raise CheckpointError(
                f"damaged LoRA: {stem} has factors of shapes {list(down)} and {list(up)}, expected [rank, "
                f"{features * hidden}] and [{' or '.join(str(out * hidden) for out in outs)}, rank] for a model of "
                f"width {hidden}"
            )
        alpha = state.get(f"{stem}.alpha")
        if alpha is not None and alpha.numel() != 1:
            raise CheckpointError(f"damaged LoRA: {stem}.alpha holds {alpha.numel()} numbers, expected one")


def lora_deltas(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """Each LoRA product as (weight name in the SD3.5 layout, third of a fused projection or None, ``[out, in]``).

    Args:
        state: the tensors of an adapter, or of a LoRA alone in diffusers' names.
    """
    for stem, (block, module) in _lora_stems(state).items():
        down, up = (state[f"{stem}.lora_{factor}.weight"].float() for factor in "AB")
        alpha = state.get(f"{stem}.alpha")
        factor = 1.0 if alpha is None else float(alpha) / down.shape[0]
        weight, third = LORA_MODULES[module]
        yield f"{MMDIT.block.format(block)}{weight}.weight", third, factor * (up @ down)


def add_lora(
    model: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], strength: float = 1.0
) -> dict[str, torch.Tensor]:
    """A diffusion model's state dict with a LoRA folded into it.

    Args:
        model: it is not changed, and untouched tensors are shared.
        state: of the LoRA, as for :func:`lora_deltas`.
        strength: factor on it.

    Raises:
        DAVAEError: the LoRA is for another model.
    """
    merged = dict(model)
    for name, third, delta in lora_deltas(state):
        if name not in model:
            raise DAVAEError(
                f"the LoRA changes {name}, which the model does not have; use the model it was trained for"
            )
        weight = merged[name].clone() if merged[name] is model[name] else merged[name]
        rows = weight if third is None else weight.chunk(3)[third]
        if rows.shape != delta.shape:
            raise DAVAEError(f"the LoRA's change of {name} is {list(delta.shape)}, expected {list(rows.shape)}")
        rows.copy_(rows.float() + strength * delta.to(rows.device))
        merged[name] = weight
    return merged
