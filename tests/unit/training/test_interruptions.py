"""Nothing is lost: whatever ends a training leaves a whole state and whole files, and says what to do."""

import contextlib
import itertools
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core.checkpoints import files
from davae_core.errors import CheckpointError, DAVAEError, WriteError
from davae_core.lock import holding
from davae_core.training.data import dataset
from davae_core.training.data.batches import Draw
from davae_core.training.run import faults, folder, loop, progress, state, stopping
from davae_core.training.run.config import OptimiserConfig
from davae_core.training.run.faults import RunError
from harness import toy_run
from harness.toy_run import FILE, Line

At = Callable[[], None]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run.draw_images(tmp_path_factory.mktemp("toy") / "images")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def whole(images: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The state of an uninterrupted run."""
    assert toy_run.run(toy_run.recipe(images, tmp_path / "whole")) == loop.FINISHED
    return state.load(tmp_path / "whole").tensors


def at(step: int, do: At) -> Line:
    """A line that does something in the forward pass of a step, once."""
    left = [do]
    return Line(lambda now: left.pop()() if now == step and left else None)


def raising(problem: BaseException) -> At:
    def act() -> None:
        raise problem

    return act


def train(images: Path, out: Path, line: Line | None = None, task: Any = None, **options: Any) -> int:
    given = toy_run.recipe(images, out, **options)
    return toy_run.run(given, {"line": line} if line else None, **(task or {}))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_nothing_is_lost(images: Path, out: Path, step: int, whole: dict[str, torch.Tensor]) -> None:
    """The state is of that step; the run goes on from it and ends as an unbroken one; nothing else lies about."""
    assert state.load(out).step == step
    assert sorted(path.name for path in out.glob(".*")) == []
    assert train(images, out, resume=True) == loop.FINISHED
    assert same(state.load(out).tensors, whole)
    assert torch.equal(files.read(out / FILE)[0]["weight"], whole["line/average/weight"])


def no_memory() -> None:
    torch.empty(1 << 60)


def broken_picture(images: Path) -> At:
    def act() -> None:
        for path in images.glob("*.png"):
            path.write_bytes(path.read_bytes()[:40])

    return act


@pytest.mark.parametrize(
    ("problem", "kind", "said"),
    [
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")),
            DAVAEError,
            r"^out of memory after step 3 \(CUDA out of memory. Tried to allocate 2.00 GiB\). Reduce --run.micro-batch "
            r"1 \(it was 2\) or --gradient-checkpointing, and the result is the same; or --data.size, which",
        ),
        (no_memory, DAVAEError, r"^out of memory after step 3 \(.*DefaultCPUAllocator.*--run.micro-batch 1 "),
        (raising(MemoryError()), DAVAEError, r"^out of memory after step 3 \(MemoryError\). Reduce --run.micro-batch"),
        (raising(RuntimeError("a kernel failed")), RunError, "ended after step 3 by RuntimeError: a kernel failed"),
        (raising(OSError(5, "Input/output error")), RunError, r"OSError: \[Errno 5\] Input/output error"),
        (raising(DAVAEError("this caption has no embedding")), DAVAEError, "^this caption has no embedding. The state"),
    ],
    ids=["gpu memory", "cpu memory", "python memory", "any error", "a disk error", "one of ours"],
)
def test_an_error_in_a_step_saves_the_steps_before_it_and_says_where(
    images: Path, out: Path, whole: dict[str, torch.Tensor], problem: At, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said) as raised:
        train(images, out, at(3, problem))
    assert str(raised.value).endswith(f"The state of step 3 is in {out}: --run.resume goes on from it")
    assert raised.value.__cause__ is not None
    check_nothing_is_lost(images, out, 3, whole)


def test_a_smaller_micro_batch_is_another_training_where_weights_are_adaptive() -> None:
    settings = {"run.batch": 4, "gradient_checkpointing": False, "critic.adaptive": True, "alignment.adaptive": False}
    said = str(faults.explained(MemoryError(), 3, "the state is here", settings))
    assert "Reduce --gradient-checkpointing, and the result is the same; or --run.micro-batch 2 (it was 4) or" in said
    same = str(faults.explained(MemoryError(), 3, "the state is here", settings | {"critic.adaptive": False}))
    assert "Reduce --run.micro-batch 2 (it was 4) or --gradient-checkpointing, and the result is the same" in same


def test_an_error_between_two_phases_leaves_both_at_one_step(images: Path, tmp_path: Path) -> None:
    for name, second in (("whole", Line()), ("out", at(3, raising(RuntimeError("in the second phase"))))):
        with contextlib.suppress(RunError):
            toy_run.run(toy_run.recipe(images, tmp_path / name), {"line": Line(), "second": second})
    assert state.load(tmp_path / "out").step == 3
    toy_run.run(toy_run.recipe(images, tmp_path / "out", resume=True), {"line": Line(), "second": Line()})
    assert same(state.load(tmp_path / "out").tensors, state.load(tmp_path / "whole").tensors)


def test_an_optimisers_step_is_not_cut_in_two(
    images: Path, out: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C twice in the middle of one: it is finished first."""
    step = torch.optim.AdamW.step
    count = iter(range(100))

    def interrupted(self: torch.optim.AdamW, closure: None = None) -> None:
        step(self)
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(stopping.ECHO_SECONDS + 0.05)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    assert train(images, out) == loop.INTERRUPTED
    check_nothing_is_lost(images, out, 4, whole)


def test_weights_in_the_middle_of_a_change_are_not_saved(
    images: Path, out: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step
    count = iter(range(100))

    def half(self: torch.optim.AdamW, closure: None = None) -> None:
        step(self)
        if next(count) == 3:
            raise torch.OutOfMemoryError("no room for moments")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", half)
        with pytest.raises(DAVAEError, match=r"out of memory after step 3.*The state of step 2 is in"):
            train(images, out, keep_every=2)
    check_nothing_is_lost(images, out, 2, whole)


@pytest.mark.skipif(sys.platform != "linux", reason="loading processes are forked")
def test_a_loading_process_that_is_killed_is_named(images: Path, out: Path, whole: dict[str, torch.Tensor]) -> None:
    def kill() -> None:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()

    with pytest.raises(DAVAEError, match=r"process that loads images has ended.*memory.*--data\.workers.*The state of"):
        train(images, out, at(3, kill), steps=1000, data={"workers": 1})
    step = state.load(out).step
    assert step >= 3
    files_there = {path.name for path in out.iterdir()}
    assert state.FILE in files_there and not any(name.startswith(".") for name in files_there)
    assert train(images, out, resume=True, steps=step + 1) == loop.FINISHED


@pytest.mark.parametrize("workers", [0, 1])
def test_a_codec_that_fails_saves_first(images: Path, out: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """In a loading process, too, whose message comes with a traceback of its own."""
    item, count = dataset.ImageData.__getitem__, itertools.count()

    def fails(self: dataset.ImageData, draw: Draw) -> dataset.Item:
        if next(count) == 5:  # of the third step
            raise RuntimeError("decoder lost its way")
        return item(self, draw)

    monkeypatch.setattr(dataset.ImageData, "__getitem__", fails)
    with pytest.raises(RunError, match=r"by RuntimeError: (RuntimeError: )?decoder lost its way\. ") as raised:
        train(images, out, data={"workers": workers})
    assert state.load(out).step == 2
    assert str(raised.value).endswith(f"The state of step 2 is in {out}: --run.resume goes on from it")


def test_pictures_that_break_on_the_way_end_the_run_with_its_state_saved(tmp_path: Path, out: Path) -> None:
    own = toy_run.draw_images(tmp_path / "own")
    with pytest.raises(DAVAEError, match=r"images could not be read.*--data\.max-broken.*The state of step \d is in"):
        train(own, out, at(3, broken_picture(own)))
    assert state.load(out).step == 4
    assert not (out / FILE).exists()


@pytest.mark.parametrize(
    "problem", [RuntimeError("no such kernel"), torch.OutOfMemoryError("CUDA out of memory")], ids=["error", "memory"]
)
def test_a_sheet_that_fails_is_a_warning(
    images: Path,
    out: Path,
    whole: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    problem: Exception,
) -> None:
    assert train(images, out, task={"on_sheet": raising(problem)}, sample_every=3) == loop.FINISHED
    said = capsys.readouterr().err
    for step in (3, 6, 8):
        reason = f"{type(problem).__name__}: {problem}"
        assert f"warning: the sheet of samples of step {step} failed ({reason}): the training goes on" in said
    check_nothing_is_lost(images, out, 8, whole)


def test_the_state_and_the_files_are_written_before_the_picture(images: Path, out: Path) -> None:
    there: list[set[str]] = []
    task = {"on_sheet": lambda: there.append({path.name for path in out.iterdir()})}
    train(images, out, task=task)
    assert [{state.FILE, FILE} <= names for names in there] == [True]


def test_a_signal_while_a_picture_is_drawn_gives_it_up(
    images: Path, out: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    gone_on: list[int] = []

    def drawn() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        gone_on.append(1)

    assert train(images, out, task={"on_sheet": drawn}, sample_every=3) == loop.INTERRUPTED
    assert not gone_on
    assert "stopped at step 3 of 8 (SIGTERM)" in capsys.readouterr().err
    check_nothing_is_lost(images, out, 3, whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_that_has_room_again_costs_nothing(
    images: Path, out: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The state cannot be saved for a while, and TensorBoard not written to: the training goes on."""
    monkeypatch.setattr("davae_core.training.run.keeper.RETRY_SECONDS", 0.0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_and_free(step: int) -> None:
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, limit[1]))
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert train(images, out, Line(full_and_free), save_minutes=0.0) == loop.FINISHED
    said = capsys.readouterr().err
    assert re.search(
        rf"{out / state.FILE} could not be written .*The training goes on and tries again; the state of step 2",
        said,
    )
    check_nothing_is_lost(images, out, 8, whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_stays_full_leaves_the_last_state(images: Path, out: Path, whole: dict[str, torch.Tensor]) -> None:
    def at_four(step: int) -> None:
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            WriteError, match=r"could not be written .*room.*The state of step 8 could not be saved"
        ) as e:
            train(images, out, Line(at_four), keep_every=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert str(e.value).endswith(f"the state of step 4 is in {out}: --run.resume goes on from it")
    check_nothing_is_lost(images, out, 4, whole)


def test_curves_that_cannot_be_written_are_a_warning(
    images: Path, out: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def no_room(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("davae_core.training.run.progress.SummaryWriter", no_room)
    assert train(images, out) == loop.FINISHED
    said = capsys.readouterr().err
    assert (
        said.count("TensorBoard's files cannot be written at step 1 (OSError: [Errno 28] No space left on device)") == 1
    )
    check_nothing_is_lost(images, out, 8, whole)


def test_samples_that_cannot_be_written_are_a_warning(
    images: Path, out: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    (out / "samples").write_text("in the way")
    assert train(images, out) == loop.FINISHED
    assert "the sheet of samples of step 8 failed (" in capsys.readouterr().err
    check_nothing_is_lost(images, out, 8, whole)


def test_a_file_that_cannot_be_exported_leaves_the_state_of_the_last_step(
    images: Path, out: Path, whole: dict[str, torch.Tensor]
) -> None:
    (out / FILE).mkdir(parents=True)
    with pytest.raises(WriteError, match=rf"{FILE} could not be written.*The state of step 8 is in .*: --run.resume"):
        train(images, out)
    (out / FILE).rmdir()
    check_nothing_is_lost(images, out, 8, whole)


def test_a_terminal_that_is_gone_does_not_stop_a_run(
    images: Path, out: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            return False

    line = at(3, lambda: (monkeypatch.setattr(sys, "stderr", Gone()), os.kill(os.getpid(), signal.SIGHUP))[0])
    assert train(images, out, line) == loop.INTERRUPTED
    monkeypatch.undo()
    check_nothing_is_lost(images, out, 4, whole)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")])
def test_a_screen_that_goes_away_between_two_steps_does_not_hold_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """Where the thread that lets the clock go on is the first to notice."""

    class Screen:
        encoding, gone = "utf-8", False

        def write(self, text: str) -> int:
            if self.gone:
                raise error
            return len(text)

        def flush(self) -> None:
            self.write("")

        def isatty(self) -> bool:
            return False

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.05)
    report = progress.Report(tmp_path, 0, 10, True)
    screen.gone = True
    time.sleep(0.3)
    main = threading.Thread(target=lambda: (report.step(), report.say("a line"), report.close()), daemon=True)
    main.start()
    main.join(5)
    assert not main.is_alive()


def test_what_nohup_ignores_stays_ignored(images: Path, out: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(images, out, at(3, lambda: os.kill(os.getpid(), signal.SIGHUP))) == loop.FINISHED
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_damaged_state_is_named_and_left_as_it_is(images: Path, out: Path) -> None:
    train(images, out)
    content = (out / state.FILE).read_bytes()
    (out / state.FILE).write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is not a readable safetensors file .*cut off"):
        train(images, out, resume=True)
    assert (out / state.FILE).read_bytes() == content[:-5]


def test_a_second_run_in_a_folder_is_refused(images: Path, out: Path) -> None:
    def second() -> None:
        with pytest.raises(DAVAEError, match=rf"another run is at work in {out}: wait.*--run\.out"):
            train(images, out, resume=True)

    assert train(images, out, at(3, second)) == loop.FINISHED
    assert train(images, out, resume=True) == loop.FINISHED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": {"images": ("nowhere",)}}, "nowhere"),
        ({"data": {"images": ("EMPTY",)}}, "holds no images"),
        ({"data": {"images": ("BROKEN",)}}, "could not be read"),
        ({"data": {"size": 9}}, "not a multiple of 8"),
    ],
    ids=["wrong path", "empty folder", "unreadable images", "wrong size"],
)
def test_a_run_that_never_began_leaves_nothing(
    images: Path, tmp_path: Path, out: Path, options: dict[str, Any], said: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    broken = toy_run.draw_images(tmp_path / "BROKEN")
    broken_picture(broken)()
    if "images" in options.get("data", {}):
        options = {"data": {"images": tuple(str(tmp_path / name) for name in options["data"]["images"])}}
    with pytest.raises(DAVAEError, match=said):
        train(images, out, **options)
    assert not out.exists()
    assert train(images, out) == loop.FINISHED


def test_an_error_in_the_first_step_leaves_nothing(images: Path, out: Path) -> None:
    with pytest.raises(DAVAEError, match=r"this cache is stale. No step was done yet, so there is nothing to resume"):
        train(images, out, at(0, raising(DAVAEError("this cache is stale"))))
    assert not out.exists()
    assert train(images, out) == loop.FINISHED


def test_resume_with_nothing_there_says_so_and_begins(
    images: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert train(images, out, resume=True) == loop.FINISHED
    assert f"there is nothing to resume in {out}: the run starts from the beginning" in caplog.messages


def test_a_diverged_run_goes_on_as_its_message_says(images: Path, out: Path) -> None:
    line = Line()
    forward = Line.forward

    def diverges(self: Line, batch: Any, step: int) -> Any:
        losses = forward(self, batch, step)
        return {"loss": losses["loss"] * float("nan")} if step >= 3 else losses

    line.forward = diverges.__get__(line)  # type: ignore[method-assign]
    with pytest.raises(DAVAEError, match="not finite in 2 steps in a row") as raised:
        train(images, out, line, bad_steps=2)
    advice = re.search(r"\(--run.resume --run.change optimiser.lr --optimiser.lr ([\d.]+)\)", str(raised.value))
    assert advice
    lower = OptimiserConfig(lr=float(advice[1]), warmup=0, ema=0.9)
    assert train(images, out, resume=True, change=("optimiser.lr",), optimiser=lower) == loop.FINISHED


def test_the_lock_of_a_run_is_not_held_by_the_processes_it_forked(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holding(lock) as free:
        assert free
        fork = multiprocessing.get_context("fork")
        begun = fork.Event()
        child = fork.Process(target=lambda: (begun.set(), time.sleep(30)))
        child.start()
        begun.wait()
    with holding(lock) as free:
        assert free
    child.kill()
    child.join()


def test_a_lock_that_was_removed_while_it_was_opened_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from davae_core import lock as module

    path, take, removed = tmp_path / "lock", module._take, []

    def slow(number: int) -> bool:
        if not removed:
            removed.append(path.unlink())
        return take(number)

    monkeypatch.setattr(module, "_take", slow)
    with holding(path) as free:
        assert free and path.exists()
        monkeypatch.setattr(module, "_take", take)
        with holding(path) as second:
            assert not second


def test_the_folder_of_a_run_names_what_is_in_its_way(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot be the folder of a run .*--run\.out"):
        train(images, tmp_path / "file" / "run")
    assert folder.LOCK.startswith(".")
