"""An adapted model, frozen, with several LoRAs of which one at a time counts, or none: then it is the teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ...adapter import zero_adapter
from ...few_steps import FewStepLora
from ...latent import LatentSpec
from . import lora
from .adapted import frozen_model
from .lora import LoraLinear
from .recompute import recompute

TEACHER = ""


class FewStepModel(nn.Module):
    """One set of weights that serves as teacher, as student, and as whatever else has a LoRA.

    Args:
        adapted: state dict of the adapted model.
        latent: that it draws.
        names: of the LoRAs. Each begins with no effect.
        rank, targets: of each of them.
        seed: draws their first factors.
        start: what the first of them has learned already.
        frozen: dtype of the matrices that are not trained.
    """

    def __init__(
        self,
        adapted: Mapping[str, torch.Tensor],
        latent: LatentSpec,
        names: Sequence[str],
        rank: int,
        targets: tuple[str, ...],
        seed: int,
        start: FewStepLora | None = None,
        frozen: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.mmdit = frozen_model(adapted, frozen)
        base = replace(self.mmdit.config, in_channels=latent.base_channels, out_channels=latent.base_channels)
        generator = torch.Generator().manual_seed(seed)
        self.places: dict[str, dict[str, tuple[LoraLinear, str]]] = {}
        for name in names:
            own = zero_adapter(base, latent, rank, targets, generator).lora_state()
            if start is not None and name == names[0]:
                own = {key: start.state[key].float() for key in own}
            self.places[name] = lora.attach(self.mmdit, own)
        self.use(TEACHER)

    def use(self, name: str) -> None:
        """From now on the LoRA of this name counts and no other; :data:`TEACHER`: none."""
        for other, places in self.places.items():
            for layer, _ in places.values():
                layer.on = other == name

    def factors(self, name: str) -> nn.ParameterDict:
        """The trained tensors of a LoRA."""
        out = nn.ParameterDict()
        for stem, (layer, key) in self.places[name].items():
            plain = stem.replace(".", "/")
            out[f"{plain}/down"], out[f"{plain}/up"] = layer.down[key], layer.up[key]
        return out

    def lora(self, name: str) -> dict[str, torch.Tensor]:
        """A LoRA in its file's names."""
        return lora.tensors(self.places[name])

    def checkpoint_blocks(self) -> None:
        """Compute the blocks again in the backward pass instead of keeping what is inside them. Whose pass it is must
        not change before: :meth:`use` again what was used."""
        recompute(self.mmdit.joint_blocks)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        present: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :class:`MMDiT`, with ``x [B, C + D, h, w]``."""
        return self.mmdit(x, t, context, pooled, present)
