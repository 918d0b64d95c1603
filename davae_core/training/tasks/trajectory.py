"""Few steps by the teacher's own path: each of the student's steps goes where the teacher goes in many.

The student starts each step where it has got to by itself, so that it learns to mend what its own steps before got
wrong. Sources: progressive distillation (arXiv 2202.00512), guidance folded into it (2210.03142).
"""

from torch import nn

from ..data.draws import Draws
from ..run.task import Batch, Losses
from .rollout import STUDENT, LoraPhase, Rollout


class TrajectoryPhase(LoraPhase):
    """Squared error between the velocity of a step and that which would lead to the teacher's end of it.

    Args:
        rollout, factors, seed: see there.
        substeps: the teacher's steps for one of the student's.
        channels: of the base, for the log.
    """

    def __init__(self, rollout: Rollout, factors: nn.ParameterDict, seed: int, substeps: int, channels: int) -> None:
        super().__init__(rollout, factors, seed)
        self.substeps, self.channels = substeps, channels

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        rollout = self.rollout
        point = rollout.begin(batch, Draws(self.seed, step, batch["position"]))
        end = rollout.solved(point, self.substeps)
        wanted = (end - point.x) / (point.after - point.now).view(-1, 1, 1, 1)
        rollout.model.use(STUDENT)
        error = (rollout.model(point.x, point.now, *point.asked).float() - wanted).square()
        base, detail = error.tensor_split([self.channels], dim=1)
        return {"loss": error.mean(), "base": base.mean().detach(), "detail": detail.mean().detach()}
