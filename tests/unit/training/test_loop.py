"""The loop itself, on a task small enough to see through: a line that is fitted."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend

from davae_core.errors import CheckpointError, DAVAEError
from davae_core.history import History
from davae_core.training.run import loop, precision, state, stopping
from davae_core.training.run.config import OptimiserConfig, RunConfig
from davae_core.training.run.task import Batch, Losses, Phase

Read = Callable[[Path], dict[str, dict[int, float]]]
Trouble = Callable[[torch.Tensor], torch.Tensor]
TRAINED = OptimiserConfig(lr=0.1, warmup=0, ema=0.9)


def nan_loss(weight: torch.Tensor) -> torch.Tensor:
    return weight.sum() * float("nan")


def infinite_loss(weight: torch.Tensor) -> torch.Tensor:
    return weight.sum() * float("inf")


def nan_gradient(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 0).sqrt().sum()


class Line(Phase):
    """Pulls its weights to 3; at the steps ``bad`` the loss has ``trouble`` added."""

    def __init__(self, bad: Collection[int] = (), trouble: Trouble = nan_loss, start: int = 0, size: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, size + 1))
        self.bad, self.trouble, self.start = bad, trouble, start
        self.seen: dict[int, torch.Tensor] = {}
        self.at_step: Callable[[int], None] = lambda step: None

    def starts_at(self) -> int:
        return self.start

    def forward(self, batch: Batch, step: int) -> Losses:
        self.at_step(step)
        self.seen[step] = self.weight.detach().clone()
        loss = ((self.weight - 3) ** 2).sum()
        return {"loss": loss + self.trouble(self.weight) if step in self.bad else loss}


class LineTask:
    """Shows and exports nothing, but keeps the weights that it would have shown."""

    def __init__(self, **phases: Phase) -> None:
        self.phases: dict[str, Phase] = phases
        self.shown: list[torch.Tensor] = []

    def to(self, device: torch.device) -> None:
        pass

    def sheet(self, batch: Batch) -> torch.Tensor:
        self.shown += [p.detach().clone() for p in self.phases["line"].parameters()]
        return torch.zeros(3, 8, 8)

    def export(self, folder: Path, history: History) -> list[Path]:
        self.sheet({})
        return []


def batches(start: int) -> Iterator[Batch]:
    for step in itertools.count(start):
        yield {"step": step, "micro": 0, "micros": 1, "share": 1.0}


def train(task: LineTask, out: Path, steps: int = 8, **options: Any) -> int:
    run = RunConfig(out, steps=steps, log_every=1, sample_every=0, **options)
    return loop.train(task, {"name": "line"}, run, TRAINED, Accelerator(), batches)


@pytest.mark.parametrize("trouble", [nan_loss, infinite_loss, nan_gradient])
def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(
    curves: Read, tmp_path: Path, trouble: Trouble
) -> None:
    line = Line({2, 3}, trouble)
    assert train(LineTask(line=line), tmp_path) == loop.FINISHED
    moved = [not torch.equal(line.seen[step], line.seen[step + 1]) for step in range(7)]
    assert moved == [True, True, False, False, True, True, True]
    assert line.weight.isfinite().all()
    assert curves(tmp_path)["skipped"] == {1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2}
    saved = state.load(tmp_path)
    assert (saved.step, saved.skipped) == (8, 2)
    assert saved.tensors["line/moment/weight/step"] == 6


def test_a_skipped_step_leaves_the_average_and_the_moments_alone(tmp_path: Path) -> None:
    kept = []
    for bad in ((), (3,)):
        out = tmp_path / str(bad)
        assert train(LineTask(line=Line(bad)), out, steps=3 + len(bad)) == loop.FINISHED
        kept.append(state.load(out).tensors)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_one_phase_that_is_not_finite_does_not_stop_the_other(tmp_path: Path) -> None:
    line, other = Line({1}), Line()
    train(LineTask(line=line, other=other), tmp_path)
    assert torch.equal(line.seen[1], line.seen[2])
    assert not torch.equal(other.seen[1], other.seen[2])
    assert state.load(tmp_path).skipped == 1


def test_too_many_bad_steps_in_a_row_end_the_run_with_its_state_saved(tmp_path: Path) -> None:
    line = Line(range(4, 100))
    with pytest.raises(DAVAEError, match=r"in 3 steps in a row, up to step 7: .*nan.*optimiser\.lr") as problem:
        train(LineTask(line=line), tmp_path, steps=50, bad_steps=3)
    assert f"The state of step 7 is in {tmp_path}: --run.resume goes on from it" in str(problem.value)
    saved = state.load(tmp_path)
    assert (saved.step, saved.skipped) == (7, 3)
    assert torch.equal(saved.tensors["line/weight/weight"], line.seen[4])
    assert train(LineTask(line=Line()), tmp_path, steps=9, resume=True) == loop.FINISHED


def test_bad_steps_are_counted_in_a_row(tmp_path: Path) -> None:
    assert train(LineTask(line=Line({1, 2, 4, 5, 7})), tmp_path, steps=9, bad_steps=3) == loop.FINISHED
    assert state.load(tmp_path).skipped == 5


def test_a_phase_takes_part_from_its_step_on(curves: Read, tmp_path: Path) -> None:
    late = Line(start=3)
    train(LineTask(line=Line(), late=late), tmp_path)
    assert sorted(late.seen) == [3, 4, 5, 6, 7]
    assert sorted(curves(tmp_path)["late/loss"]) == [4, 5, 6, 7, 8]
    assert state.load(tmp_path).tensors["late/moment/weight/step"] == 5


def test_what_is_shown_and_exported_is_the_average(tmp_path: Path) -> None:
    line = Line()
    task = LineTask(line=line)
    train(task, tmp_path)
    saved = state.load(tmp_path).tensors
    average, weight = saved["line/average/weight"], saved["line/weight/weight"]
    assert not torch.allclose(average, weight, atol=1e-3)
    assert len(task.shown) == 2
    assert all(torch.equal(shown, average) for shown in task.shown)
    assert torch.equal(line.weight, weight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Line()
    line.at_step = lambda step: os.kill(os.getpid(), number) if step == 3 else None
    task = LineTask(line=line)
    assert train(task, tmp_path) == loop.INTERRUPTED == 130
    assert max(line.seen) == 3
    saved = state.load(tmp_path)
    assert saved.step == 4
    assert torch.equal(saved.tensors["line/weight/weight"], line.weight)
    said = f"stopped at step 4 of 8 ({number.name}); the state of step 4 is in {tmp_path}: --run.resume goes on from it"
    assert said in capsys.readouterr().err
    assert task.shown == []


def test_a_second_ctrl_c_ends_the_run_at_once_with_the_steps_before_it_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Line()

    def twice(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(stopping.ECHO_SECONDS + 0.05)
            os.kill(os.getpid(), signal.SIGINT)

    line.at_step = twice
    assert train(LineTask(line=line), tmp_path) == loop.INTERRUPTED
    assert max(line.seen) == 2
    assert state.load(tmp_path).step == 3
    assert f"stopped (SIGINT) at step 3 of 8; the state of step 3 is in {tmp_path}" in capsys.readouterr().err


def test_signals_are_what_they_were_after_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    train(LineTask(line=Line()), tmp_path, steps=1)
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_the_state_is_written_as_often_as_asked_for(tmp_path: Path) -> None:
    found: dict[bool, list[bool]] = {}
    for often in (True, False):
        line, out = Line(), tmp_path / str(often)
        found[often] = []
        line.at_step = lambda step, out=out, often=often: found[often].append((out / state.FILE).exists())  # type: ignore[misc]
        train(LineTask(line=line), out, steps=3, save_minutes=0.0 if often else 60.0)
    assert found == {True: [False, True, True], False: [False, False, False]}


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    train(LineTask(line=Line()), tmp_path, steps=1)
    for task in (LineTask(line=Line(size=3)), LineTask(curve=Line())):
        with pytest.raises(CheckpointError, match="another model; choose another folder"):
            train(task, tmp_path, resume=True)


def test_the_gradient_is_logged_before_it_is_clipped(curves: Read, tmp_path: Path) -> None:
    train(LineTask(line=Line()), tmp_path, steps=1)
    gradient = curves(tmp_path)["line/gradient"][1]
    assert gradient == pytest.approx((4**2 + 2**2) ** 0.5)  # 2 (w - 3) for w = 1, 2; clip is 1


def test_bf16_is_what_is_asked_for_or_what_the_device_can() -> None:
    cpu = torch.device("cpu")

    def computes(asked: str) -> torch.dtype:
        with precision.autocast(asked, cpu):
            return (torch.ones(1, 1) @ torch.ones(1, 1)).dtype

    assert computes("fp32") is torch.float32
    assert computes("bf16") is torch.bfloat16
    assert computes("auto") is (torch.bfloat16 if precision.computes_bf16(cpu) else torch.float32)


def test_attention_is_plain_only_where_bf16_is_trained_on_a_cpu() -> None:
    q = torch.randn(1, 1, 4, 8)

    def fused(asked: str) -> bool:
        with precision.attention(asked, torch.device("cpu")):
            return torch._fused_sdp_choice(q, q, q) != SDPBackend.MATH.value

    assert fused("fp32") and not fused("bf16")
    assert fused("auto") is not precision.computes_bf16(torch.device("cpu"))


def test_a_clip_of_0_clips_nothing(tmp_path: Path) -> None:
    """SGD would tell all lengths apart; AdamW tells a gradient from none, and a clipped one by its second moment."""
    kept = []
    for clip in (0.0, 1e9, 0.1):
        run = RunConfig(tmp_path / str(clip), steps=4, log_every=1, sample_every=0)
        trained = replace(TRAINED, clip=clip)
        assert (
            loop.train(LineTask(line=Line()), {"name": "line"}, run, trained, Accelerator(), batches) == loop.FINISHED
        )
        kept.append(state.load(run.out).tensors)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    second = "line/moment/weight/exp_avg_sq"
    assert (kept[0][second] > kept[2][second]).all() and not torch.equal(
        kept[0]["line/weight/weight"], torch.arange(2.0)
    )


def test_of_two_phases_the_one_that_went_on_is_named(tmp_path: Path) -> None:
    line, other = Line(range(4, 100)), Line()
    said = "a phase kept its weights where its own loss or gradient was not finite; those of other were changed by some"
    with pytest.raises(DAVAEError, match=f"(?i){said}"):
        train(LineTask(line=line, other=other), tmp_path / "one", steps=50, bad_steps=3)
    assert torch.equal(line.seen[4], line.seen[6]) and not torch.equal(other.seen[4], other.seen[6])
    with pytest.raises(DAVAEError, match="None of these steps changed the weights"):
        train(LineTask(line=Line(range(4, 100)), other=Line(range(4, 100))), tmp_path / "both", steps=50, bad_steps=3)
