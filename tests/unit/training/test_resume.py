"""A training that was stopped, interrupted or killed goes on as if nothing had happened, bit for bit."""

import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core.checkpoints import files
from davae_core.errors import CheckpointError, DAVAEError
from davae_core.training.run import state
from harness import warm

OPTIONS = {
    "base_autoencoder": "",
    "base_dit": "--flow.prompt-dropout 0.3",
    "autoencoder": "--critic.weight 0.1 --critic.start 2 --critic.width 8 --critic.layers 2 --alignment.adaptive",
    "adapter": "--flow.prompt-dropout 0.3 --flow.min-snr 5",
}
Tensors = dict[str, torch.Tensor]


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", OPTIONS)
def test_a_resumed_run_has_the_losses_and_the_weights_of_an_unbroken_one(
    stages: Any, tmp_path: Path, stage: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = [*OPTIONS[stage].split(), "--optimiser.schedule", "constant"]  # a cosine would depend on the last step
    assert stages.run(stage, whole, 8, *more) == 0
    assert stages.run(stage, parts, 3, *more) == 0
    time.sleep(1.1)  # TensorBoard orders its files by the second
    assert stages.run(stage, parts, 8, "--run.resume", *more) == 0
    curves = stages.curves(parts)
    assert curves == stages.curves(whole)
    assert all(max(points) == 8 for points in curves.values())
    assert same(stages.weights(parts), stages.weights(whole))
    assert same(stages.exported(stage, parts), stages.exported(stage, whole))


@pytest.fixture
def begun(stages: Any, tmp_path: Path) -> Path:
    """A run of the adapter after two steps."""
    return Path(shutil.copytree(stages.folder("adapter"), tmp_path / "begun"))


def test_the_weights_still_move_after_a_resume(stages: Any, begun: Path) -> None:
    before = stages.weights(begun)
    assert stages.run("adapter", begun, 3, "--run.resume", "--run.change", "run.steps") == 0
    after = stages.weights(begun)
    assert [name for name in before if "/weight/" in name and torch.equal(before[name], after[name])] == []


def test_a_finished_run_that_is_resumed_only_exports(stages: Any, begun: Path) -> None:
    before, file = stages.weights(begun), begun / stages.exports["adapter"][0]
    exported = files.read(file)[0]
    file.unlink()
    assert stages.run("adapter", begun, 2, "--run.resume") == 0
    assert same(stages.weights(begun), before)
    assert same(files.read(file)[0], exported)


def test_resume_in_an_empty_folder_begins(stages: Any, tmp_path: Path) -> None:
    assert stages.run("adapter", tmp_path, 1, "--run.resume") == 0
    assert state.load(tmp_path).step == 1


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--optimiser.lr 0.5", r"optimiser\.lr: was 0\.001, is 0\.5"),
        ("--run.batch 8", r"run\.batch: was 4, is 8"),
        ("--run.seed 1", r"run\.seed: was 0, is 1"),
        ("--rank 8 --data.flip", r"data\.flip: was False, is True; rank: was 4, is 8"),
    ],
)
def test_a_run_with_other_settings_is_not_a_resumed_run(stages: Any, begun: Path, more: str, named: str) -> None:
    before = stages.weights(begun)
    with pytest.raises(DAVAEError, match=f"other settings.*{named}.*another folder"):
        stages.run("adapter", begun, 2, "--run.resume", *more.split())
    assert same(stages.weights(begun), before)


def test_what_does_not_change_a_step_may_change_between_runs(stages: Any, begun: Path) -> None:
    more = "--run.resume --run.save-minutes 1 --run.sample-every 1 --run.bad-steps 3 --run.micro-batch 2"
    more += " --run.change run.steps"
    assert stages.run("adapter", begun, 3, *more.split()) == 0
    assert (begun / "samples" / "step_0000003.png").is_file()


def test_a_folder_with_a_run_in_it_is_not_written_over(stages: Any, begun: Path) -> None:
    content = (begun / state.FILE).read_bytes()
    with pytest.raises(DAVAEError, match=r"holds the state of a run.*--run\.resume.*--run\.out"):
        stages.run("adapter", begun, 3)
    assert (begun / state.FILE).read_bytes() == content


def test_a_folder_with_a_run_of_another_script_is_refused(stages: Any, begun: Path) -> None:
    with pytest.raises(DAVAEError, match=r"other settings.*another folder"):
        stages.run("base_dit", begun, 2, "--run.resume")


def test_a_file_that_is_no_state_is_refused(stages: Any, tmp_path: Path) -> None:
    (tmp_path / state.FILE).write_bytes(stages.file("adapter").read_bytes())
    with pytest.raises(CheckpointError, match="not the state of a training"):
        stages.run("adapter", tmp_path, 2, "--run.resume")


def test_a_damaged_state_is_named(stages: Any, begun: Path) -> None:
    content = (begun / state.FILE).read_bytes()
    (begun / state.FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=re.escape(state.FILE)):
        stages.run("adapter", begun, 2, "--run.resume")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(stages: Any, tmp_path: Path, number: signal.Signals) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    constant = ["--optimiser.schedule", "constant", "--run.save-minutes", "1000"]
    command = stages.command("adapter", parts, 1_000_000, "--run.sample-every", "4", *constant)
    script = warm.Program("davae_core.training", "adapter", *command)
    wait_for(parts / "samples" / "step_0000004.png", script)
    assert not (parts / state.FILE).exists()
    script.send_signal(number)
    said = script.communicate()[1]
    assert script.returncode == 130
    assert "Traceback" not in said
    step = state.load(parts).step
    name = signal.Signals(number).name
    assert f"stopped at step {step} of 1000000 ({name}); the state of step {step} is in {parts}: --run.resume" in said
    assert stages.run("adapter", parts, step + 2, "--run.resume", *constant) == 0
    assert stages.run("adapter", whole, step + 2, *constant) == 0
    assert same(stages.weights(parts), stages.weights(whole))


def wait_for(path: Path, script: warm.Program) -> None:
    while not path.exists():
        assert script.poll() is None, script.communicate()[1]
        time.sleep(0.02)


@pytest.mark.parametrize(("count", "steps"), [(1, 6), pytest.param(10, 25, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(stages: Any, tmp_path: Path, count: int, steps: int) -> None:
    dice, kills, runs, whole = random.Random(0), [], 0, tmp_path / "whole"
    assert run_apart(stages, whole, steps) == 0
    while len(kills) < count:
        out, runs = tmp_path / str(runs), runs + 1
        while run_apart(stages, out, steps, dice.randrange(6), dice.uniform(0, 0.1)) != 0:
            kills.append(state.load(out).step if (out / state.FILE).exists() else 0)
        assert same(stages.weights(out), stages.weights(whole))
        assert same(stages.exported("adapter", out), stages.exported("adapter", whole))
        assert list(out.glob(".*")) == []
    print(f"killed in {runs} runs, with these steps done: {kills}")


def run_apart(stages: Any, out: Path, steps: int, saves: int | None = None, pause: float = 0.0) -> int | None:
    """Start or resume a run that saves at every step, in a process of its own.

    Args:
        stages: how to.
        out: folder of the run.
        steps: of the whole run.
        saves: SIGKILL after so many savings; None: never.
        pause: and so many seconds after them.

    Returns:
        The exit code, -9 after a kill.
    """
    command = stages.command("adapter", out, steps, "--run.resume", "--run.save-minutes", "0")
    child = warm.Program("davae_core.training", "adapter", *command)
    if saves is not None:
        seen = [saved_at(out)]
        while len(seen) <= saves and child.poll() is None:
            if saved_at(out) != seen[-1]:
                seen.append(saved_at(out))
            time.sleep(0.001)
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode


def saved_at(out: Path) -> int:
    return (out / state.FILE).stat().st_mtime_ns if (out / state.FILE).exists() else 0
