"""The adversary of stage 1: a patch critic with hinge loss, which tells images from reconstructions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn

from ... import bounds
from ..run.task import Batch, Losses, Phase

GROUPS = 8  # of channels, for the norms


@dataclass(frozen=True)
class CriticConfig:
    """The adversarial loss."""

    weight: float = 0.0
    """Weight of the adversarial loss; 0 for none."""
    adaptive: bool = False
    """Multiply the weight by the ratio of the gradients of the other losses and of the adversarial loss, on the
    decoder's last layer."""
    start: int = 5000
    """First step with a critic."""
    width: int = 64
    """Channels of the critic's first layer, a multiple of 4."""
    layers: int = 3
    """Strided layers; each halves the resolution."""

    def __post_init__(self) -> None:
        if not self.weight:
            return
        bounds.require("critic.layers", self.layers, self.layers >= 0, "at least 0")
        # The norms are of twice this width and more; without further layers there are none.
        fits = self.width >= 1 and (not self.layers or 2 * self.width % GROUPS == 0)
        bounds.require("critic.width", self.width, fits, f"a multiple of {GROUPS // 2}, as 32 or 64")


class PatchCritic(nn.Module):
    """One score per patch (as in pix2pix, arXiv 1611.07004, with group norm): ``[B, 3, H, W] -> [B, 1, h, w]``."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if i < layers - 1 else 1
            parts += [nn.Conv2d(a, b, 4, stride, padding=1), nn.GroupNorm(GROUPS, b), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores: high for images, low for reconstructions."""
        return self.layers(x)


class CriticPhase(Phase):
    """Trains the critic on the images and the other phase's reconstructions.

    Args:
        critic: what is trained.
        start: the step at which it begins.
        reconstructions: by the number of the micro-batch; the other phase puts them there, on the CPU, for they are
            those of a whole step. They do not travel in the batch, because DistributedDataParallel hands a module a
            copy of its arguments on a GPU.
    """

    def __init__(self, critic: PatchCritic, start: int, reconstructions: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self.critic, self.start, self.reconstructions = critic, start, reconstructions

    def starts_at(self) -> int:
        """The step at which the adversarial loss begins."""
        return self.start

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        x, y = batch["image"], self.reconstructions[batch["micro"]]
        scores = self.critic(torch.cat([x, y.to(x)])).float()
        real, fake = scores.chunk(2)
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return {"loss": loss, "real": real.mean(), "fake": fake.mean()}


def gradient_ratio(loss: torch.Tensor, other: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """|d loss / d parameter| over |d other / d parameter|, at most 10^4; of the whole batch over all processes."""
    norms = []
    for value in (loss, other):
        (gradient,) = torch.autograd.grad(value, parameter, retain_graph=True)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(gradient)
        norms.append(gradient.norm())
    return (norms[0] / (norms[1] + 1e-8)).clamp(max=1e4).detach()
