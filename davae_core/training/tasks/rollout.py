"""What both few-step methods do: let the student draw from noise up to one of its steps, and ask the teacher."""

from dataclasses import dataclass

import torch
from torch import nn

from ... import flow
from ...embeddings import Embeddings, Encoded
from ...prompts import encode
from ...text_encoder import TextEncoder
from ..data.draws import Draws
from ..run.task import Batch, Phase
from .few_step_model import TEACHER, FewStepModel

STUDENT = "student"


@dataclass(frozen=True)
class Point:
    """Where the student is before one of its steps.

    Attributes:
        x: ``[B, c, h, w]``.
        step: ``[B]``, which of its steps is next.
        now, after: ``[B]``, the times before and after that step.
        asked, empty: the captions, and the empty one, encoded.
    """

    x: torch.Tensor
    step: torch.Tensor
    now: torch.Tensor
    after: torch.Tensor
    asked: Encoded
    empty: Encoded


@dataclass(frozen=True)
class Rollout:
    """Draws as the student and as the teacher do.

    Attributes:
        model: both of them.
        text: encodes captions.
        steps: of the student.
        shift: of the times.
        cfg: the teacher's guidance.
    """

    model: FewStepModel
    text: TextEncoder | Embeddings
    steps: int
    shift: float
    cfg: float

    @torch.no_grad()
    def begin(self, batch: Batch, draws: Draws) -> Point:
        """Noise, taken by the student to a step that is chosen for each sample."""
        x = draws.normal("noise", batch["latent"])
        times = flow.sigmas(self.steps, self.shift).to(x)
        step = (draws.uniform("jump") * self.steps).long().clamp(max=self.steps - 1).to(x.device)
        captions = batch["caption"]
        asked, empty = (encode(self.text, some, x.device) for some in (captions, [""] * len(captions)))
        self.model.use(STUDENT)
        for i in range(self.steps - 1):
            t = times[i].expand(len(x))
            moved = x + (times[i + 1] - times[i]) * self.model(x, t, *asked).float()
            x = torch.where((step > i).view(-1, 1, 1, 1), moved, x)
        return Point(x, step, times[step], times[step + 1], asked, empty)

    @torch.no_grad()
    def teacher(self, x: torch.Tensor, t: torch.Tensor, point: Point) -> torch.Tensor:
        """The teacher's velocity with its guidance, at times ``t [B]``."""
        self.model.use(TEACHER)
        asked = self.model(x, t, *point.asked).float()
        if self.cfg == 1:
            return asked
        empty = self.model(x, t, *point.empty).float()
        return empty + self.cfg * (asked - empty)

    @torch.no_grad()
    def solved(self, point: Point, substeps: int) -> torch.Tensor:
        """Where the teacher gets to from ``point`` in the time of one of the student's steps, ``[B, c, h, w]``."""
        x, fine = point.x, flow.sigmas(self.steps * substeps, self.shift).to(point.x)
        for j in range(substeps):
            here = point.step * substeps + j
            now, after = fine[here], fine[here + 1]
            x = x + (after - now).view(-1, 1, 1, 1) * self.teacher(x, now, point)
        return x


class LoraPhase(Phase):
    """A phase that trains one LoRA of the model.

    Args:
        rollout: draws.
        factors: what is trained.
        seed: random seed.
    """

    def __init__(self, rollout: Rollout, factors: nn.ParameterDict, seed: int) -> None:
        super().__init__()
        self.factors, self.seed = factors, seed
        self._rollout = (rollout,)  # in a tuple: the frozen model is no part of what is trained

    @property
    def rollout(self) -> Rollout:
        """What draws."""
        return self._rollout[0]
