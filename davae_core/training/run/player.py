"""A phase of a training with what trains it."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from accelerate import Accelerator

from ...errors import CheckpointError
from . import optimiser as opt
from . import sharding
from . import state as states
from .config import OptimiserConfig
from .ema import EMA
from .task import Phase

WEIGHT, AVERAGE, MOMENT = "weight/", "average/", "moment/"


class Player:
    """A phase with its optimiser and its average: both of the trained parameters alone."""

    def __init__(self, phase: Phase, config: OptimiserConfig, accelerator: Accelerator) -> None:
        self.phase, self.sharded = phase, sharding.asked(accelerator)
        if self.sharded:
            sharding.shard(phase, accelerator)
        self.parameters = {name: p for name, p in phase.named_parameters() if p.requires_grad}
        self.optimiser = opt.adamw(self.parameters, config)
        self.ema = EMA(self.parameters, config.ema)
        copied = accelerator.num_processes > 1 and not self.sharded
        self.wrapped = accelerator.prepare_model(phase) if copied else phase
        self._stepping = False

    @property
    def torn(self) -> bool:
        """The weights are in the middle of a change that was begun and not finished: no state to save."""
        return self._stepping or self.ema.swapped

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that changes while training."""
        weights = {f"{WEIGHT}{name}": p for name, p in self.parameters.items()}
        averages = {f"{AVERAGE}{name}": tensor for name, tensor in self.ema.average.items()}
        moments = opt.state_tensors(self.optimiser, self.parameters)
        return weights | averages | {f"{MOMENT}{name}": tensor for name, tensor in moments.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what :meth:`tensors` gave. An average that was not kept so far starts at the weights."""
        weights = states.part(tensors, WEIGHT)
        averages = states.part(tensors, AVERAGE) or weights
        for saved, own in ((weights, self.parameters), (averages, self.ema.average or None)):
            if own is None:
                continue
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
                raise CheckpointError("the saved state is of another model; choose another folder for this run")
            for name, tensor in own.items():
                tensor.copy_(sharding.part_of(saved[name], tensor))
        opt.load_state(self.optimiser, self.parameters, states.part(tensors, MOMENT))

    def step(self, rate: float, step: int) -> None:
        """Change the weights by their gradients, at learning rate ``rate``; ``step`` counts from 0."""
        self._stepping = True
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.ema.update(step + 1 - self.phase.starts_at())
        self._stepping = False

    def syncing(self, last: bool, accelerator: Accelerator) -> AbstractContextManager:
        """Gradients are added over the processes once a step, at its last micro-batch."""
        if self.sharded:
            sharding.sum_gradients(self.phase, last)
            return nullcontext()
        return nullcontext() if last else accelerator.no_sync(self.wrapped)


def gather(players: Mapping[str, Player], keep: bool) -> dict[str, torch.Tensor]:
    """All that changes while training, whole; with FSDP every process calls this, and those that keep get it."""
    out = {}
    for name, player in players.items():
        for key, tensor in player.tensors().items():
            full = sharding.whole(tensor)
            if keep:
                out[f"{name}/{key}"] = full.cpu() if player.sharded else full
    return out


@contextmanager
def averages(players: Mapping[str, Player]) -> Iterator[None]:
    """Inside, the weights of all phases are their averages."""
    with ExitStack() as stack:
        for player in players.values():
            stack.enter_context(player.ema.applied())
        yield
