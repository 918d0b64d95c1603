"""The fuzzer: a short run finds nothing, and what is wrong is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from davae_core.errors import CheckpointError
from harness.soak import __main__ as soak
from harness.soak import damage, originals, outcomes, report, worker
from harness.soak.outcomes import Tally
from harness.soak.subjects import ITSELF, SUBJECTS, Subject, WrongError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file of every kind."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    originals.make(folder)
    return folder


@pytest.mark.parametrize("count", [120, pytest.param(400, marks=pytest.mark.slow)])
def test_a_short_run_finds_nothing(tmp_path: Path, count: int) -> None:
    """A run of 20,000 files is in docs/RELIABILITY.md; this one has other files."""
    tally = soak.run(count, seed=7, state=tmp_path / "soak.json", workers=2)
    assert tally.finds == [] and tally.done == count
    assert tally.counts[outcomes.REFUSED] > tally.counts[outcomes.READ] > 0


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = soak.run(3, seed=1, state=tmp_path / "soak.json")
    again = soak.run(3, seed=1, state=tmp_path / "soak.json")
    assert first.done == again.done == 3 and first.counts == again.counts


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: f"{subject.name} {subject.original}")
def test_what_is_not_damaged_is_read(good: Path, tmp_path: Path, subject: Subject) -> None:
    """Else a refusal would say nothing."""
    outcome, words = worker.read(subject, good / subject.original, tmp_path, good, "nothing")
    assert outcome == outcomes.READ, words


def outcome_of(good: Path, tmp_path: Path, read) -> str:
    subject = Subject("x", "adapter.safetensors", ITSELF, read)
    return worker.read(subject, good / "adapter.safetensors", tmp_path, good, "adapter.safetensors: !cut")[0]


def raises(problem: BaseException):
    def read(*_: Path) -> None:
        raise problem

    return read


@pytest.mark.parametrize(
    ("problem", "outcome"),
    [
        (CheckpointError("adapter.safetensors is damaged"), outcomes.REFUSED),
        (CheckpointError("it is damaged"), outcomes.NAMELESS),
        (WrongError("a shape"), outcomes.WRONG),
        (IndexError("tuple index out of range"), outcomes.RAW),
        (MemoryError(), outcomes.RAW),
        (SystemExit(1), outcomes.RAW),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_every_outcome_is_told(good: Path, tmp_path: Path, problem: BaseException, outcome: str) -> None:
    assert outcome_of(good, tmp_path, raises(problem)) == outcome


def test_what_may_not_be_accepted_is_wrong(good: Path, tmp_path: Path) -> None:
    assert outcome_of(good, tmp_path, lambda *_: None) == outcomes.WRONG


def test_time_and_memory_are_measured(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Path) -> None:
        end = worker.time.process_time() + 2.1
        while sum(range(1000)) and worker.time.process_time() < end:
            pass

    def large(*_: Path) -> None:
        torch.ones(80 * 2**20)

    monkeypatch.setattr(worker.damage, "of", lambda _: [lambda *_: "nothing"])
    for read, outcome in ((slow, outcomes.HANG), (large, outcomes.MEMORY)):
        monkeypatch.setattr(worker, "TURNS", (Subject("x", "adapter.safetensors", ITSELF, read),))
        assert worker.one(0, 0, good, tmp_path / "place")[1] == outcome


def test_a_worker_that_ends_is_a_crash_and_is_started_anew(tmp_path: Path) -> None:
    a_worker = soak.Worker(tmp_path, 0, "0")
    a_worker.command = [soak.sys.executable, "-c", "import os; input(); os.abort()"]
    assert a_worker.ask(5)[:2] == [5, outcomes.CRASH] == a_worker.ask(5)[:2]
    a_worker.end()


def test_damage_is_the_same_for_the_same_seed(good: Path, tmp_path: Path) -> None:
    for number in range(len(SUBJECTS)):
        places = []
        for name in ("a", "b"):
            (tmp_path / f"{name}{number}").mkdir()
            places.append(worker.spoil(3, number, good, tmp_path / f"{name}{number}"))
        assert places[0][2:] == places[1][2:]
    assert {damage.settings, damage.entry, damage.reshape} <= set(damage.of(Path("x.safetensors")))


def test_a_run_has_one_row_in_the_table(tmp_path: Path) -> None:
    document = tmp_path / "R.md"
    document.write_text(f"# Title\n\n{report.MARK}\n\nAfter.\n\n| another table |\n")
    for done in (10, 20):
        tally = Tally(seed=1, done=done)
        tally.counts[outcomes.READ] = done
        report.write(document, tally)
    report.write(document, Tally(seed=2, done=5))
    text = document.read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nAfter.\n\n| another table |\n")
    assert text.count("--seed 1`") == 1 and "| 20 | 20 |" in text and "--seed 2`" in text
