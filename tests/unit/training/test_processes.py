"""The same global batch gives the same training, however it is divided: among processes, or in time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from davae_core.training.run import state

OPTIONS = {
    "base_autoencoder": "",
    "base_dit": "--flow.min-snr 5 --flow.prompt-dropout 0.3",
    "autoencoder": "--critic.weight 0.1 --critic.start 2 --critic.width 8 --critic.layers 2 --alignment.adaptive",
    "adapter": "--flow.min-snr 5 --flow.prompt-dropout 0.3",
}
DRIVER = """
import json, sys

from davae_core.training import stages

for stage, command in json.loads(sys.argv[1]):
    assert stages.run(stage, command) == 0
"""
STEPS = 4
# Three images for two processes, one at a time: the second process has one image, and takes part twice.
UNEVEN = ["--run.batch", "3", "--run.micro-batch", "1"]
# Adam follows the sign of its first gradients, so where one is near zero its last bits decide. Small steps keep apart
# what this makes of rounding, and what a wrong batch would.
CALM = ("--optimiser.lr", "1e-4", "--run.precision", "fp32")


Curves = dict[str, dict[int, float]]


def largest_difference(a: Curves, b: Curves) -> float:
    """Relative, over all curves and steps."""
    assert {name: sorted(points) for name, points in a.items()} == {name: sorted(points) for name, points in b.items()}
    pairs = [(a[name][step], b[name][step]) for name in a for step in a[name]]
    return max(abs(x - y) / max(abs(x), abs(y), 1e-12) for x, y in pairs)


@pytest.fixture(scope="module")
def two_processes(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each script under ``accelerate launch``, on two processes; the adapter's also in two parts each."""
    out = tmp_path_factory.mktemp("two")
    commands = []
    for stage, options in OPTIONS.items():
        parts = "--run.micro-batch 1" if stage == "adapter" else ""
        commands.append((stage, stages.command(stage, out / stage, STEPS, *CALM, *options.split(), *parts.split())))
    commands.append(("base_dit", stages.command("base_dit", out / "uneven", STEPS, *CALM, *UNEVEN)))
    driver = out / "driver.py"
    driver.write_text(DRIVER)
    launched = launch(str(driver), json.dumps(commands))
    said = launched.communicate()[1]
    assert launched.returncode == 0, said
    assert said.count("wrote") == 7, "both processes took themselves for the first"
    return out


def launch(*command: str) -> subprocess.Popen[str]:
    """A script on two processes without a GPU, in a session of its own as in a terminal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port} --mixed_precision no"
    root = str(Path(__file__).parents[3])
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--dynamo_backend", "no", *command],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("stage", OPTIONS)
def test_two_processes_give_the_losses_of_one(stages: Any, two_processes: Path, tmp_path: Path, stage: str) -> None:
    assert stages.run(stage, tmp_path, STEPS, *CALM, *OPTIONS[stage].split()) == 0
    difference = largest_difference(stages.curves(tmp_path), stages.curves(two_processes / stage))
    print(f"{stage}: {difference:.1e}")
    assert difference < 1e-4


def test_a_batch_that_two_processes_cannot_halve_gives_the_losses_of_one(
    stages: Any, two_processes: Path, tmp_path: Path
) -> None:
    assert stages.run("base_dit", tmp_path, STEPS, *CALM, "--run.batch", "3") == 0
    assert largest_difference(stages.curves(tmp_path), stages.curves(two_processes / "uneven")) < 1e-4


def test_ctrl_c_ends_both_processes_with_the_state_saved(stages: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = stages.command("adapter", out, 1_000_000, "--run.sample-every", "4", "--optimiser.schedule", "constant")
    launched = launch("-m", "davae_core.training", "adapter", *command)
    while not (out / "samples" / "step_0000004.png").exists():
        assert launched.poll() is None, launched.communicate()[1]
        time.sleep(0.02)
    os.killpg(launched.pid, signal.SIGINT)
    said = launched.communicate(timeout=300)[1]
    assert launched.returncode != 0
    step = state.load(out).step
    assert f"stopped at step {step} of 1000000" in said
    assert stages.run("adapter", out, step + 1, "--run.resume", "--optimiser.schedule", "constant") == 0


@pytest.mark.parametrize("stage", OPTIONS)
def test_a_batch_in_parts_gives_the_losses_of_the_whole(stages: Any, tmp_path: Path, stage: str) -> None:
    # The adaptive weight is a ratio of gradients of what is seen at once, so it is not the same in parts.
    options = OPTIONS[stage].replace("--alignment.adaptive", "").split()
    for parts in (0, 2, 1):
        assert stages.run(stage, tmp_path / str(parts), STEPS, "--run.micro-batch", str(parts), *CALM, *options) == 0
    # Behind the kinks of the critic's activations rounding picks the slope: 2.3e-4 of the gradient at its first step.
    whole, *others = (split(stages.curves(tmp_path / parts)) for parts in "021")
    for losses, gradients in others:
        assert largest_difference(whole[0], losses) < 1e-4
        assert largest_difference(whole[1], gradients) < 1e-3


def split(curves: Curves) -> tuple[Curves, Curves]:
    """Losses, and norms of gradients."""
    gradients = {name: points for name, points in curves.items() if name.endswith("/gradient")}
    return {name: points for name, points in curves.items() if name not in gradients}, gradients


def test_losses_of_other_seeds_are_other_losses(stages: Any, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert stages.run("adapter", tmp_path / seed, STEPS, "--run.seed", seed) == 0
    assert largest_difference(stages.curves(tmp_path / "0"), stages.curves(tmp_path / "1")) > 1e-2
