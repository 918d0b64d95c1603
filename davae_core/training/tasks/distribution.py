"""Few steps by matching distributions: the student's pictures are moved to where the teacher finds more of its own.

Two scores are compared on the student's noised pictures: the teacher's, with guidance, and that of a model which is
trained on the student's pictures meanwhile. Source: DMD2 (arXiv 2405.14867), without its discriminator. Teacher,
student and the third are one frozen model with two LoRAs.
"""

import torch
from torch import nn

from ... import flow
from ..data.draws import Draws
from ..objective import FlowConfig, noised
from ..run.task import Batch, Losses
from .rollout import STUDENT, LoraPhase, Point, Rollout

FAKE = "fake"
Drawn = dict[int, tuple[torch.Tensor, Point]]


class _Scored(LoraPhase):
    """One of the two players.

    Args:
        rollout, factors, seed: see there.
        times: at which the scores are compared, and the third model learns.
        drawn: what the student has drawn in this step, by micro-batch; it goes from one player to the other.
    """

    def __init__(self, rollout: Rollout, factors: nn.ParameterDict, seed: int, times: FlowConfig, drawn: Drawn) -> None:
        super().__init__(rollout, factors, seed)
        self.times, self.drawn = times, drawn


class DistributionPhase(_Scored):
    """The student."""

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        rollout = self.rollout
        model, draws = rollout.model, Draws(self.seed, step, batch["position"])
        point = rollout.begin(batch, draws)
        model.use(STUDENT)
        x0 = point.x - point.now.view(-1, 1, 1, 1) * model(point.x, point.now, *point.asked).float()
        self.drawn[batch["micro"]] = x0.detach(), point
        with torch.no_grad():
            seen = noised(x0.detach(), Draws(self.seed + 1, step, batch["position"]), self.times)
            t = seen.t.view(-1, 1, 1, 1)
            real = seen.x - t * rollout.teacher(seen.x, seen.t, point)
            model.use(FAKE)
            fake = seen.x - t * model(seen.x, seen.t, *point.asked).float()
            size = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-4)
            direction = (fake - real) / size
        model.use(STUDENT)  # for a backward pass that computes the blocks again
        loss = 0.5 * (x0 - (x0.detach() - direction)).square().mean()
        return {"loss": loss, "apart": (fake - real).square().mean()}


class FakePhase(_Scored):
    """The model of the student's pictures: flow matching on what the student has just drawn."""

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        model = self.rollout.model
        x0, point = self.drawn.pop(batch["micro"])
        seen = noised(x0, Draws(self.seed + 2, step, batch["position"]), self.times)
        model.use(FAKE)
        prediction = model(seen.x, seen.t, *point.asked)
        return {"loss": flow.flow_loss(prediction, seen.target, x0.shape[1], 1.0)[0]}
