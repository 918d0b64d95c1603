"""What keeps a run: its state, its checkpoints, and the files it leaves."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ...errors import DAVAEError
from ...history import History
from . import faults, folder, player, sharding
from . import state as states
from .config import RunConfig, without_folders
from .progress import Report
from .resume import where
from .task import Task

RETRY_SECONDS = 60.0


class Keeper:
    """Saves and exports one run.

    Args:
        task, players: what is trained.
        recipe: the flat settings.
        run: where to, and how often.
        about: what the run is.
        accelerator: its processes.
        report: says what was written.
    """

    def __init__(
        self,
        task: Task,
        players: Mapping[str, player.Player],
        recipe: dict[str, Any],
        run: RunConfig,
        about: states.About,
        accelerator: Accelerator,
        report: Report,
    ) -> None:
        self.task, self.players, self.recipe, self.run, self.about = task, players, recipe, run, about
        self.report, self.main, self.sharded = report, accelerator.is_main_process, sharding.asked(accelerator)
        self.step = self.start = self.saved = 0
        self.skipped = 0
        self._due = time.monotonic() + run.save_minutes * 60

    def begin_at(self, step: int, skipped: int) -> None:
        """The run goes on from a state of ``step`` steps, or begins at 0."""
        self.step = self.start = self.saved = step
        self.skipped = skipped

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() > self._due

    def save(self) -> None:
        """Write the state; all processes call this.

        Raises:
            WriteError: it cannot be written; the last one is still there.
        """
        tensors = player.gather(self.players, keep=self.main) if self.main or self.sharded else {}
        if self.main:
            with self.report.doing("saving the state"):
                self._write(tensors)
        self.saved = self.step
        self._due = time.monotonic() + self.run.save_minutes * 60

    def try_to_save(self) -> None:
        """Write the state, or say why it cannot be: the training goes on, and tries again in a minute."""
        try:
            self.save()
            self.report.retry()
        except DAVAEError as problem:
            self._due = time.monotonic() + RETRY_SECONDS
            self.report.warn(f"{problem}. The training goes on and tries again; {self.where()}")

    def save_alone(self) -> str:
        """Write the state without the other processes, after an error; what became of it, as a clause.

        Weights, averages and moments are the same on all processes, unless these share them (FSDP).
        """
        if self.step != self.saved and not self.sharded and not any(one.torn for one in self.players.values()):
            try:
                self._write(player.gather(self.players, keep=True))
                self.saved = self.step
            except Exception as problem:
                return f"the state of step {self.step} could not be saved ({faults.told(problem)}); {self.where()}"
        return self.where()

    def where(self) -> str:
        """Which state there is and how to go on from it, as a clause."""
        if (self.run.out / states.FILE).exists():
            return where(self.run.out, self.saved)
        return "there is no state yet" if self.step else "no step was done yet, so there is nothing to resume"

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        states.save(self.run.out, states.State(self.recipe, self.step, self.skipped, tensors, self.about))

    def export(self, to: Path) -> None:
        """Write the finished files with the averaged weights; all processes call this."""
        phases = [one.phase for one in self.players.values()]
        with player.averages(self.players), sharding.gathered(phases), torch.no_grad(), self.report.doing("export"):
            if self.main:
                to.mkdir(parents=True, exist_ok=True)
                for path in self.task.export(to, history(self.about, self.recipe, self.step)):
                    self.report.say(f"wrote {path}")

    def checkpoint(self) -> None:
        """Keep the state that was just saved, and the files of it, in a folder of their own; says why if it cannot."""
        to = folder.checkpoint(self.run.out, self.step)
        try:
            if self.main:
                folder.keep_state(self.run.out, self.step)
            self.export(to)
            if self.main:
                folder.prune(self.run.out, self.run.keep_last)
        except (DAVAEError, OSError, RuntimeError) as problem:
            if self.sharded:  # the others are waiting
                raise
            self.report.warn(f"the checkpoint {to} could not be kept ({faults.told(problem)}): the training goes on")

    def write_config(self, device: str, processes: int) -> None:
        """Write the settings beside the state; says why if it cannot."""
        if not self.main:
            return
        try:
            folder.write_config(self.run.out, self.about, {"device": device, "processes": processes})
        except DAVAEError as problem:
            self.report.warn(f"{problem}. The training goes on")


def history(about: states.About, recipe: Mapping[str, Any], step: int) -> History:
    """What an exported file tells of its training; nothing of where its files lay."""
    settings = {**without_folders(recipe), **({"changes": list(about.changes)} if about.changes else {})}
    rate = about.highest_rate or float(recipe.get("optimiser.lr", 0.0))
    return History(step, rate, int(recipe.get("run.seed", 0)), about.recipe, settings)
