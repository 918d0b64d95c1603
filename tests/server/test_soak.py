"""A short server soak: one of each disturbance, in one life of the server."""

from __future__ import annotations

import pytest

from harness.soak import report
from harness.soak import server as soak
from harness.soak.outcomes import Tally

pytestmark = pytest.mark.server


def test_a_disturbed_server_draws_the_same_pictures_in_the_same_memory_with_the_same_weights() -> None:
    counts = soak.soak(minutes=0, flags=[("--cache-none", "--disable-mmap")], pictures=1)
    assert counts.finds == []
    assert counts.counts["killed"] == 1 and counts.counts["refused"] == 2 and counts.counts["drawn"] >= 20
    assert counts.counts["out of memory, drawn"] + counts.counts["out of memory, reported"] == 4


def test_a_row_takes_the_place_of_the_last_run_of_that_comfyui(tmp_path) -> None:
    document = tmp_path / "RELIABILITY.md"
    document.write_text(f"# Reliability\n\n{report.MARK}\n\n## More\n\n{soak.MARK}\n")
    report.write(document, Tally(seed=1, done=10))
    for version, found in (("0.33.0", 1), ("0.3.75", 0), ("0.33.0", 0)):
        counts = soak.Counts(finds=["something"] * found)
        soak.write(document, soak.row(counts, 10, 0, version), version)
    report.write(document, Tally(seed=1, done=20))  # the table above; the one below stays
    text = document.read_text()
    rows = [line for line in text.partition("## More")[2].splitlines() if "dev.py soak" in line]
    assert len(rows) == 2 and all(line.endswith("| 0 |") for line in rows)
    assert text.startswith("# Reliability\n") and text.count("--files") == 1 and "--files 20 --seed 1" in text
    assert all(line.count("|") == soak.HEAD.count("|") for line in rows)
