"""The training loop: the same for every task, one process or many."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ...errors import CheckpointError, DAVAEError
from . import optimiser as opt
from . import sharding
from . import state as states
from .config import OptimiserConfig, RunConfig, differences
from .ema import EMA
from .on_device import OnDevice
from .progress import Report
from .task import Batch, Phase, Task
from .validation import Validation

Batches = Callable[[int], Iterable[Batch]]
FINISHED, INTERRUPTED = 0, 130


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

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that changes while training."""
        weights = {f"weight/{name}": p for name, p in self.parameters.items()}
        averages = {f"average/{name}": tensor for name, tensor in self.ema.average.items()}
        moments = opt.state_tensors(self.optimiser, self.parameters)
        return weights | averages | {f"moment/{name}": tensor for name, tensor in moments.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        for prefix, own in (("weight/", self.parameters), ("average/", self.ema.average)):
            saved = states.part(tensors, prefix)
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
                raise CheckpointError("the saved state is of another model; choose another folder for this run")
            for name, tensor in own.items():
                tensor.copy_(sharding.part_of(saved[name], tensor))
        opt.load_state(self.optimiser, self.parameters, states.part(tensors, "moment/"))


def train(
    task: Task,
    recipe: dict[str, Any],
    run: RunConfig,
    optimiser: OptimiserConfig,
    accelerator: Accelerator,
    batches: Batches,
    validation: Validation | None = None,
) -> int:
    """Train ``task`` to ``run.steps`` and export it.

    Args:
        task: what to train.
        recipe: all settings, flat; kept with the state, so that a resumed run is the same run.
        run: length, batch, output.
        optimiser: of every phase.
        accelerator: device and processes.
        batches: gives this process's micro-batches from a step on.
        validation: held-out images and the prompts of the sheets.

    Returns:
        FINISHED, or INTERRUPTED after Ctrl-C or SIGTERM; the state is saved in both cases.

    Raises:
        DAVAEError: the loss stays not finite, or the folder holds another run.
    """
    validation = validation or Validation()
    task.to(accelerator.device)
    players = {name: Player(phase, optimiser, accelerator) for name, phase in task.phases.items()}
    step, skipped = _restore(run, recipe, players)
    report = Report(run.out, step, run.steps, accelerator.is_main_process)

    main, sharded = accelerator.is_main_process, sharding.asked(accelerator)

    def save() -> None:
        tensors = _gather(players, keep=main) if main or sharded else {}
        if main:
            states.save(run.out, states.State(recipe, step, skipped, tensors))

    def show(batch: Batch) -> None:
        if main or sharded:
            with _averages(players), torch.no_grad(), autocast(run, accelerator.device):
                report.sheet(step, task.sheet(validation.sheet(batch)))

    def validate() -> None:
        if validation and (main or sharded):
            with _averages(players), torch.no_grad(), autocast(run, accelerator.device):
                report.validation(step, task.validate(validation.batches(accelerator.device)))

    saved_at, bad = time.monotonic(), 0
    # With FSDP no process can save alone, and an error may be of one process only.
    with _stop_signals() as stopped, _saved_on_error(report, None if sharded else save):
        if step == 0:
            validate()
        for micros in _whole_steps(batches(step), accelerator.device) if step < run.steps else ():
            rate = opt.learning_rate(optimiser, step, run.steps)
            logs: dict[str, float] = {"lr": rate}
            finite = True
            for name, player in players.items():
                if step >= player.phase.starts_at():
                    values = _descend(player, micros, step, rate, optimiser.clip, run, accelerator)
                    good = all(torch.isfinite(torch.tensor([values["loss"], values["gradient"]])))
                    finite = finite and good
                    logs |= {f"{name}/{key}": value for key, value in values.items()}
            step += 1
            bad, skipped = (0, skipped) if finite else (bad + 1, skipped + 1)
            report.step()
            if step % run.log_every == 0:
                report.scalars(step, logs | {"skipped": skipped})
            last, stop = step >= run.steps, _agreed(stopped(), accelerator)
            if last or (run.sample_every and step % run.sample_every == 0):
                show(micros[0])
            if last or (run.validate_every and step % run.validate_every == 0):
                validate()
            due = _agreed(time.monotonic() - saved_at > run.save_minutes * 60, accelerator)
            if due or last or stop:
                save()
                saved_at = time.monotonic()
            if bad >= run.bad_steps:
                if sharded:  # all processes are here; otherwise the error itself saves
                    save()
                raise DAVAEError(
                    f"the loss or the gradient was not finite in {bad} steps in a row, up to step {step}: {logs}. None "
                    "of these steps changed the weights, and the state is saved. Lower optimiser.lr, or use "
                    "--run.precision fp32"
                )
            if stop and not last:
                report.say(f"stopped at step {step} of {run.steps}; the state is in {run.out}: --run.resume goes on")
                report.close()
                return INTERRUPTED
            if last:
                break
    with _averages(players), sharding.gathered(task.phases.values()), torch.no_grad():
        for path in task.export(run.out) if main else ():
            report.say(f"wrote {path}")
    report.close()
    accelerator.wait_for_everyone()
    return FINISHED


def autocast(run: RunConfig, device: torch.device) -> AbstractContextManager:
    """The precision of the forward pass."""
    bf16 = run.precision == "bf16" or (run.precision == "auto" and computes_bf16(device))
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def computes_bf16(device: torch.device) -> bool:
    """Whether the device is faster in bf16 than in fp32.

    CPUs are with AMX alone: AVX512_BF16 reached 0.55 of fp32's speed in products and convolutions, emulation 0.03.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def _descend(
    player: Player,
    micros: Sequence[Batch],
    step: int,
    rate: float,
    clip: float,
    run: RunConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """One optimiser step of one phase; the weights stay where the loss or the gradient is not finite.

    Returns:
        The losses, averaged over micro-batches and processes, and the norm of the gradient before clipping.
    """
    player.optimiser.zero_grad(set_to_none=True)
    sums: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micros):
        with _syncing(player, i == len(micros) - 1, accelerator):
            with autocast(run, accelerator.device):
                losses = player.wrapped(batch, step)
            (losses["loss"] * batch["share"]).backward()
        for name, value in losses.items():
            part = value.detach().float() * batch["share"]
            sums[name] = sums[name] + part if name in sums else part
    reduced = accelerator.reduce(torch.stack(list(sums.values())), reduction="mean")
    norm = sharding.whole(nn.utils.clip_grad_norm_(player.parameters.values(), clip))
    values = dict(zip([*sums, "gradient"], [*reduced.tolist(), float(norm)], strict=True))
    if bool(torch.isfinite(norm)) and bool(torch.isfinite(torch.tensor(values["loss"]))):
        for group in player.optimiser.param_groups:
            group["lr"] = rate
        player.optimiser.step()
        player.ema.update(step + 1 - player.phase.starts_at())
    return values


def _syncing(player: Player, last: bool, accelerator: Accelerator) -> AbstractContextManager:
    """Gradients are added over the processes once a step, at its last micro-batch."""
    if player.sharded:
        sharding.sum_gradients(player.phase, last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(player.wrapped)


def _gather(players: dict[str, Player], keep: bool) -> dict[str, torch.Tensor]:
    """All that changes while training, whole; with FSDP every process calls this, and those that keep get it."""
    out = {}
    for name, player in players.items():
        for key, tensor in player.tensors().items():
            full = sharding.whole(tensor)
            if keep:
                out[f"{name}/{key}"] = full.cpu() if player.sharded else full
    return out


def _whole_steps(micros: Iterable[Batch], device: torch.device) -> Iterator[OnDevice]:
    """Micro-batches collected into steps; each comes to the device when it is asked for."""
    step: list[Batch] = []
    for batch in micros:
        step.append(batch)
        if len(step) == batch["micros"]:
            yield OnDevice(step, device)
            step = []


def _restore(run: RunConfig, recipe: dict[str, Any], players: dict[str, Player]) -> tuple[int, int]:
    """Steps done and skipped; loads the state where the run is to go on."""
    there = (run.out / states.FILE).is_file()
    if not run.resume or not there:
        if there:
            raise DAVAEError(
                f"{run.out} holds the state of a run: go on with it (--run.resume), or choose another folder "
                "(--run.out)"
            )
        return 0, 0
    saved = states.load(run.out)
    changed = differences(saved.recipe, recipe)
    if changed:
        raise DAVAEError(
            f"the run in {run.out} was made with other settings, so this would not be the same run: "
            f"{'; '.join(changed)}. Use the old settings, or another folder (--run.out)"
        )
    for name, player in players.items():
        player.load(states.part(saved.tensors, f"{name}/"))
    return saved.step, saved.skipped


@contextmanager
def _saved_on_error(report: Report, save: Callable[[], None] | None) -> Iterator[None]:
    """What stops the training inside does not lose the steps before it."""
    try:
        yield
    except DAVAEError:
        if save is not None:
            save()
        report.close()
        raise


@contextmanager
def _averages(players: dict[str, Player]) -> Iterator[None]:
    """Inside, the weights of all phases are their averages."""
    with ExitStack() as stack:
        for player in players.values():
            stack.enter_context(player.ema.applied())
        yield


def _agreed(flag: bool, accelerator: Accelerator) -> bool:
    """True on all processes if it is on any."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second one stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
