"""The benchmarks' command: a toy case in this process, and the quick run as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases
from benchmarks.sides import CORE, Side

ROOT = Path(__file__).resolve().parents[2]
TRIES = 3


def test_the_command_times_a_case_and_writes_its_figures_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = (Side("adapted", 128, CORE), Side("native", 64, CORE))
    toy = cases.Case("toy", "adapted / native", sides, rounds=2, scale="toy", blocks=2)
    monkeypatch.setattr(cases, "quick", lambda: [toy])
    path = tmp_path / "toy.json"
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # the command turns autograd off for its process
        assert command.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0
    told = json.loads(path.read_text(encoding="utf-8"))
    assert_whole(told)
    assert [case["name"] for case in told["cases"]] == ["toy"] and told["bounds"] == []
    assert "toy ..." in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_run_keeps_its_bounds(tmp_path: Path) -> None:
    """In one of three tries: another program on the machine can take time from one side of a ratio alone."""
    path = tmp_path / "quick.json"
    run = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--json", str(path)]
    for _ in range(TRIES):
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        told = json.loads(path.read_text(encoding="utf-8"))
        kept = [bound["passed"] for bound in told["bounds"]]
        assert len(kept) == 4 and done.returncode == (0 if all(kept) else 1), done.stdout + done.stderr
        if all(kept):
            break
    assert all(kept), done.stdout + done.stderr
    assert_whole(told)
    adapted, native = told["cases"][0]["sides"]
    assert adapted["flops"] == pytest.approx(native["flops"], rel=0.02)


def assert_whole(told: dict) -> None:
    assert not told["left_out"]
    assert told["machine"]["torch"] and told["date"] and told["command"].startswith("python3 dev.py bench --quick")
    for case in told["cases"]:
        assert all(len(side["seconds"]["all"]) == len(case["ratio"]["all"]) for side in case["sides"])
