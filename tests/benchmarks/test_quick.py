"""The benchmarks' quick run, as a user starts it; the ratios that are stable on any machine keep their bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quick_run_keeps_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(path.read_text(encoding="utf-8"))
    assert [bound["passed"] for bound in told["bounds"]] == [True] * 4
    assert not told["left_out"]
    assert told["machine"]["torch"] and told["date"] and told["command"].startswith("python3 dev.py bench --quick")
    for case in told["cases"]:
        assert all(len(side["seconds"]["all"]) == len(case["ratio"]["all"]) for side in case["sides"])
    adapted, native = told["cases"][0]["sides"]
    assert adapted["flops"] == pytest.approx(native["flops"], rel=0.02)
