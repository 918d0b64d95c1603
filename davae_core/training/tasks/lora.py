"""LoRA on the linear layers of an MMDiT, trained from and exported to an adapter's tensors."""

from collections.abc import Mapping

import torch
from torch import nn

from ...lora import LORA_MODULES
from ...mmdit import MMDiT


class LoraLinear(nn.Module):
    """A frozen linear layer plus low-rank changes, each of the whole output or of one third of it (fused q, k, v).

    Args:
        linear: the pretrained layer; or one of these, whose own changes then come under this one's.

    Attributes:
        on: whether the changes count.
    """

    def __init__(self, linear: "nn.Linear | LoraLinear") -> None:
        super().__init__()
        self.linear = linear if isinstance(linear, LoraLinear) else linear.requires_grad_(False)
        self.on = True
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.factor: dict[str, float] = {}

    def add(self, third: int | None, down: torch.Tensor, up: torch.Tensor, alpha: float) -> None:
        """Add the change ``alpha / rank * up [out, rank] @ down [rank, in]``."""
        key = "all" if third is None else str(third)
        self.down[key], self.up[key] = nn.Parameter(down.clone()), nn.Parameter(up.clone())
        self.factor[key] = alpha / down.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        y = self.linear(x)
        if not self.on:
            return y
        if "all" in self.down:
            return y + self._change("all", x)
        thirds = [self._change(k, x) if k in self.down else torch.zeros_like(y).chunk(3, -1)[0] for k in "012"]
        return y + torch.cat(thirds, dim=-1)

    def _change(self, key: str, x: torch.Tensor) -> torch.Tensor:
        return self.factor[key] * nn.functional.linear(nn.functional.linear(x, self.down[key]), self.up[key])


def attach(model: MMDiT, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[LoraLinear, str]]:
    """Put a LoRA on a model's layers as trainable parameters, over those that are there.

    Args:
        model: its layers are exchanged for :class:`LoraLinear`.
        state: of the LoRA, in an adapter's names.

    Returns:
        By the stem of the LoRA's names: its layer and the key of its factors there.
    """
    places: dict[str, tuple[LoraLinear, str]] = {}
    new: set[LoraLinear] = set()
    for name, down in state.items():
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        _, _, block, module = stem.split(".", 3)
        weight, third = LORA_MODULES[module]
        parent_name, _, child = f"joint_blocks.{block}.{weight}".rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = getattr(parent, child)
        if layer not in new:
            layer = LoraLinear(layer)
            new.add(layer)
            setattr(parent, child, layer)
        layer.add(third, down, state[f"{stem}.lora_B.weight"], float(state[f"{stem}.alpha"]))
        places[stem] = (layer, "all" if third is None else str(third))
    return places


def tensors(places: Mapping[str, tuple[LoraLinear, str]]) -> dict[str, torch.Tensor]:
    """The trained factors under an adapter's names."""
    out = {}
    for stem, (layer, key) in places.items():
        down, up = layer.down[key].detach(), layer.up[key].detach()
        out[f"{stem}.lora_A.weight"], out[f"{stem}.lora_B.weight"] = down, up
        out[f"{stem}.alpha"] = torch.tensor(layer.factor[key] * down.shape[0])
    return out
