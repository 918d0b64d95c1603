"""The training loop: the same for every task, one process or many."""

import math
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ...errors import DAVAEError
from . import faults, resume, sharding
from . import optimiser as opt
from . import state as states
from .config import OptimiserConfig, RunConfig
from .keeper import Keeper
from .on_device import OnDevice
from .player import Player, averages
from .precision import attention, autocast
from .progress import Report
from .stopping import Stop, Stops
from .task import Batch, Task
from .validation import Validation

Batches = Callable[[int], Iterable[Batch]]
FINISHED, INTERRUPTED = 0, 130


def train(
    task: Task,
    recipe: dict[str, Any],
    run: RunConfig,
    optimiser: OptimiserConfig,
    accelerator: Accelerator,
    batches: Batches,
    about: states.About = states.About(),
    validation: Validation | None = None,
    begun: Callable[[], object] = lambda: None,
) -> int:
    """Train ``task`` to ``run.steps`` and export it.

    Whatever ends it early, the state is saved first, unless that takes other processes, which may be gone: with FSDP
    only what all of them agree on (a stop, an unreadable image, a diverged loss) is saved at once.

    Args:
        task: what to train.
        recipe: all settings, flat; kept with the state, so that a resumed run is the same run.
        run: length, batch, output.
        optimiser: of every phase.
        accelerator: device and processes.
        batches: gives this process's micro-batches from a step on.
        about: what the run is, for those who read its files.
        validation: held-out images and the prompts of the sheets.
        begun: called by the first process when the first step is done.

    Returns:
        FINISHED, or INTERRUPTED after a signal or the end of the launcher; the state is saved in both cases.

    Raises:
        DAVAEError: the loss stays not finite, memory ran out, or the folder holds another run.
        RunError: any other error.
    """
    about = replace(about, highest_rate=max(about.highest_rate, optimiser.lr))
    saved = resume.found(run)
    if saved is not None:
        changed = resume.changes(saved, recipe, about.origins, run)
        about = replace(about, changes=(*saved.about.changes, *changed))
        about = replace(about, highest_rate=max(about.highest_rate, saved.about.highest_rate))
    task.to(accelerator.device)
    players = {name: Player(phase, optimiser, accelerator) for name, phase in task.phases.items()}
    report = Report(run.out, saved.step if saved else 0, run.steps, accelerator.is_main_process)
    keeper = Keeper(task, players, recipe, run, about, accelerator, report)
    if saved is not None:
        tensors = states.load(run.out).tensors
        for name, player in players.items():
            player.load(states.part(tensors, f"{name}/"))
        keeper.begin_at(saved.step, saved.skipped)
        del tensors
    with Stops() as stops:
        try:
            return _run(keeper, players, run, optimiser, accelerator, batches, stops, validation or Validation(), begun)
        except KeyboardInterrupt as stop:
            _let_go(stop)
            report.say(
                f"stopped ({stops.reason or 'Ctrl-C'}) at step {keeper.step} of {run.steps}; {keeper.save_alone()}"
            )
            return INTERRUPTED
        except Exception as problem:
            _let_go(problem)
            raise faults.explained(problem, keeper.step, keeper.save_alone(), recipe) from problem
        finally:
            report.close() if keeper.step or keeper.saved else report.discard()


def _let_go(problem: BaseException) -> None:
    """Free what the frames of an exception hold: activations, whose memory saving may need, and the processes that load
    images, which ignore signals and would be waited for without end where the program ends."""
    traceback.clear_frames(problem.__traceback__)


def _run(
    keeper: Keeper,
    players: dict[str, Player],
    run: RunConfig,
    optimiser: OptimiserConfig,
    accelerator: Accelerator,
    batches: Batches,
    stops: Stops,
    validation: Validation,
    begun: Callable[[], object],
) -> int:
    """The steps of :func:`train`, and the export."""
    report, device, bad = keeper.report, accelerator.device, 0
    steps = iter(_whole_steps(batches(keeper.step), device) if keeper.step < run.steps else ())
    micros: Sequence[Batch] = []
    went_on: set[str] = set()  # phases that took one of the bad steps

    def halted() -> bool:
        """Whether one of the processes is to stop; then the state is saved."""
        if not _agreed(accelerator, stops.asked())[0]:
            return False
        if keeper.step != keeper.saved:
            keeper.save()
        report.say(f"stopped at step {keeper.step} of {run.steps} ({_reason(stops)}); {keeper.where()}")
        return True

    def aside(what: str, do: Callable[[], None]) -> None:
        """Work on the averages that is no training: given up where the run is to stop; what fails is said."""
        if keeper.sharded and keeper.step != keeper.saved:
            keeper.save()  # there an error may leave the others waiting
        try:
            if keeper.main or keeper.sharded:
                given_up = nullcontext() if keeper.sharded else stops.breaking()
                with averages(players), torch.no_grad(), autocast(run.precision, device), given_up, report.doing(what):
                    do()
        except Stop:
            pass
        except Exception as problem:
            if keeper.sharded:
                raise
            report.warn(f"{what} of step {keeper.step} failed ({faults.told(problem)}): the training goes on")

    def draw() -> None:
        report.sheet(keeper.step, keeper.task.sheet(validation.sheet(micros[0])))

    def validate() -> None:
        report.validation(keeper.step, keeper.task.validate(validation.batches(device)))

    if validation and keeper.step == 0:
        aside("the validation", validate)
    while keeper.step < run.steps:
        with report.doing("first step" if keeper.step == keeper.start else ""):
            micros = _next(steps, keeper, accelerator)
        step = keeper.step
        rate = opt.learning_rate(optimiser, step, run.steps)
        logs: dict[str, float] = {"lr": rate}
        good = []
        taking_part = {name: one for name, one in players.items() if step >= one.phase.starts_at()}
        for name, player in taking_part.items():
            values = _gradients(player, micros, step, optimiser.clip, run, accelerator)
            good += [player] if math.isfinite(values["loss"]) and math.isfinite(values["gradient"]) else []
            logs |= {f"{name}/{key}": value for key, value in values.items()}
        finite = len(good) == len(taking_part)
        with stops.held():  # all phases take a step, or none: what is saved is of one step
            for player in good:
                player.step(rate, step)
            keeper.step, keeper.skipped = step + 1, keeper.skipped + (not finite)
        bad = 0 if finite else bad + 1
        went_on = set() if finite else went_on | {name for name, one in taking_part.items() if one in good}
        if step == keeper.start:
            keeper.write_config(str(device), accelerator.num_processes)
            if keeper.main:
                begun()
        report.step()
        if keeper.step % run.log_every == 0:
            report.scalars(keeper.step, logs | {"skipped": keeper.skipped})
        if bad >= run.bad_steps:
            keeper.save()
            raise DAVAEError(_diverged(bad, keeper.step, logs, optimiser, went_on))
        last = keeper.step >= run.steps
        stop, due = _agreed(accelerator, stops.asked(), keeper.due)
        if last or (stop and halted()):
            break
        keep = bool(run.keep_every) and keeper.step % run.keep_every == 0
        if due or keep:
            keeper.try_to_save()
        if keep and keeper.saved == keeper.step:
            keeper.checkpoint()
        asides: list[tuple[str, Callable[[], None]]] = []
        if run.sample_every and keeper.step % run.sample_every == 0:
            asides.append(("the sheet of samples", draw))
        if validation and run.validate_every and keeper.step % run.validate_every == 0:
            asides.append(("the validation", validate))
        for what, do in asides:
            aside(what, do)
        if asides and halted():
            break
    if keeper.step < run.steps:
        return INTERRUPTED
    if keeper.step != keeper.saved:
        keeper.save()
    keeper.export(run.out)
    if micros:
        aside("the sheet of samples", draw)
        if validation:
            aside("the validation", validate)
    accelerator.wait_for_everyone()
    return FINISHED


def _reason(stops: Stops) -> str:
    return stops.reason or "another process was told to"


def _diverged(bad: int, step: int, logs: dict[str, float], optimiser: OptimiserConfig, went_on: Collection[str]) -> str:
    """What to say of a loss that stays not finite; ``went_on`` are the phases that took one of these steps."""
    changed = "None of these steps changed the weights"
    if went_on:
        changed = (
            "A phase kept its weights where its own loss or gradient was not finite; those of "
            f"{' and '.join(sorted(went_on))} were changed by some of these steps"
        )
    return (
        f"the loss or the gradient was not finite in {bad} steps in a row, up to step {step}: {logs}. {changed}. Go on "
        f"with a lower rate (--run.resume --run.change optimiser.lr --optimiser.lr {optimiser.lr / 2:g}), or in fp32 "
        "(--run.resume --run.change run.precision --run.precision fp32)"
    )


def _gradients(
    player: Player, micros: Sequence[Batch], step: int, clip: float, run: RunConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Compute the gradients of one phase.

    Returns:
        The losses, averaged over micro-batches and processes, and ``gradient``, their norm before clipping.
    """
    player.optimiser.zero_grad(set_to_none=True)
    sums: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micros):
        device = accelerator.device
        with player.syncing(i == len(micros) - 1, accelerator), attention(run.precision, device):
            with autocast(run.precision, device):
                losses = player.wrapped(batch, step)
            (losses["loss"] * batch["share"]).backward()
        for name, value in losses.items():
            part = value.detach().float() * batch["share"]
            sums[name] = sums[name] + part if name in sums else part
    reduced = accelerator.reduce(torch.stack(list(sums.values())), reduction="mean")
    norm = sharding.whole(nn.utils.clip_grad_norm_(player.parameters.values(), clip or math.inf))
    return dict(zip([*sums, "gradient"], [*reduced.tolist(), float(norm)], strict=True))


def _whole_steps(micros: Iterable[Batch], device: torch.device) -> Iterator[OnDevice]:
    """Micro-batches collected into steps; each comes to the device when it is asked for."""
    step: list[Batch] = []
    for batch in micros:
        step.append(batch)
        if len(step) == batch["micros"]:
            yield OnDevice(step, device)
            step = []


def _next(steps: Iterator[OnDevice], keeper: Keeper, accelerator: Accelerator) -> Sequence[Batch]:
    """The next step's micro-batches. Where one process has none, all save and end together."""
    micros: Sequence[Batch] = []
    problem: Exception | None = None
    try:
        micros = next(steps)
    except StopIteration:
        problem = DAVAEError(f"there are no images for step {keeper.step + 1}")
    except Exception as error:
        problem = error
    if accelerator.num_processes > 1 and _agreed(accelerator, problem is not None)[0]:
        if keeper.step != keeper.saved:
            keeper.save()
        problem = problem or DAVAEError("another process of this run could not go on, and says why")
    if problem is not None:
        raise problem
    return micros


def _agreed(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Each flag is true on all processes if it is on any."""
    if accelerator.num_processes == 1:
        return list(flags)
    told = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return (accelerator.reduce(told, reduction="sum") > 0).tolist()
