"""Trainings as programs: how they end by signals, by errors, and behind a launcher."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from davae_core import atomic
from davae_core.training.run import folder, loop, state
from harness import toy_run, warm

LAUNCH = "accelerate.commands.launch"
SLOWLY = ["--run.steps", "100000", "--run.save-minutes", "0", "--pause", "0.02"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run.draw_images(tmp_path_factory.mktemp("toy") / "images")


def wait_for(program: warm.Program, path: Path) -> None:
    """Until a file is there."""
    while not path.exists():
        assert program.poll() is None, program.communicate()
        time.sleep(0.02)


def goes_on(images: Path, out: Path) -> int:
    """Resume a run for two steps more; the steps it had."""
    step = state.load(out).step
    assert (
        toy_run.run(toy_run.recipe(images, out, resume=True, steps=step + 2, change=("pause", "fail_at")))
        == loop.FINISHED
    )
    assert sorted(out.glob(".*")) == []
    return step


def test_an_error_that_is_not_ours_keeps_its_traceback_and_ends_with_what_to_do(images: Path, tmp_path: Path) -> None:
    """And the program ends: processes that load images do not hold it."""
    out = tmp_path / "run"
    program = warm.Program("harness.toy_run", str(images), str(out), "--data.workers", "1", "--fail-at", "3")
    said = program.communicate(timeout=100)[1]
    assert program.returncode == 1
    assert 'raise RuntimeError("a step that fails")' in said and "Traceback (most recent call last)" in said
    last = said.strip().splitlines()[-1]
    assert "RunError: the run was ended after step 3 by RuntimeError: a step that fails. The state of" in last
    assert last.endswith(f"step 3 is in {out}: --run.resume goes on from it")
    assert goes_on(images, out) == 3


def test_a_run_that_was_killed_blocks_nothing(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = warm.Program("harness.toy_run", str(images), str(out), *SLOWLY, "--data.workers", "1")
    wait_for(program, out / state.FILE)
    assert (out / folder.LOCK).exists()
    program.send_signal(signal.SIGKILL)
    program.communicate(timeout=100)
    assert goes_on(images, out) >= 1


def test_a_launcher_that_ends_takes_its_run_along_with_the_state_saved(images: Path, tmp_path: Path) -> None:
    """``accelerate launch`` of one process passes no signal on: it is gone, and the run sees that."""
    out = tmp_path / "run"
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    program = warm.Program(
        LAUNCH, *options, "--cpu", "-m", "harness.toy_run", str(images), str(out), *SLOWLY, session=True
    )
    try:
        wait_for(program, out / state.FILE)
        program.send_signal(signal.SIGTERM)
        said = until_free(program, out)
    finally:
        end(program)
    step = goes_on(images, out)
    assert f"stopped at step {step} of 100000 (the launcher has ended); the state of step {step} is in {out}" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_launcher_of_several_processes_reaches_them(
    images: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", port]
    program = warm.Program(
        LAUNCH,
        *[*options, "--mixed_precision", "no", "--dynamo_backend", "no"],
        *["-m", "harness.toy_run", str(images), str(out), *SLOWLY],
        environment={"CUDA_VISIBLE_DEVICES": ""},
        session=True,
    )
    try:
        wait_for(program, out / state.FILE)
        program.send_signal(number)
        said = until_free(program, out)
    finally:
        end(program)
    step = goes_on(images, out)
    assert f"stopped at step {step} of 100000 (" in said


def until_free(program: warm.Program, out: Path) -> str:
    """Wait for the end of the run, which may outlive its launcher; what was said."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        if not (out / folder.LOCK).exists():
            time.sleep(0.2)
            return program.communicate(timeout=100)[1]
        time.sleep(0.05)
    raise AssertionError(program.communicate()[1])


def end(program: warm.Program) -> None:
    """Leave no process of a test behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)


def test_the_folder_that_a_live_writer_writes_in_is_left_alone(tmp_path: Path) -> None:
    """A second process that writes the same file removes what dead writers left, and nothing else."""
    path = tmp_path / "file.safetensors"
    dead = tmp_path / f".{path.name}.dead{atomic.PART}"
    dead.mkdir()
    (dead / atomic.LOCK).write_bytes(b"")
    with atomic.writing(path) as temporary:
        temporary.write_bytes(b"first")
        code = f"import pathlib; from davae_core import atomic; atomic.write(pathlib.Path({str(path)!r}), b'second')"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
        assert path.read_bytes() == b"second" and not dead.exists()
        assert temporary.read_bytes() == b"first"
    assert path.read_bytes() == b"first"
    assert sorted(tmp_path.iterdir()) == [path]
