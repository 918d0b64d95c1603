"""The picture of an ablation bench."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import evidence
from davae_core.errors import DAVAEError

CURVES = {
    "0": [{"step": 100, "st-lpips-alex": 0.3}, {"step": 200, "st-lpips-alex": 0.1}],
    "1": [
        {"step": 100, "st-lpips-alex": 0.5},
        {"step": 200, "st-lpips-alex": 0.2},
        {"step": 300, "st-lpips-alex": 0.1},
    ],
}


def test_a_line_is_the_mean_over_the_seeds_where_all_were_measured() -> None:
    assert evidence.line("paper", CURVES, "st-lpips-alex").points == ((100, 0.4), (200, pytest.approx(0.15)))
    assert evidence.line("paper", {}, "psnr").points == ()


def test_every_variant_with_a_curve_is_drawn_under_its_name(tmp_path: Path) -> None:
    table = {"adapter/paper": {"curves": CURVES}, "adapter/base-ahead": {"curves": CURVES}}
    table["sampling/cfg-1"] = {"curves": {"0": [{"step": 0, "st-lpips-alex": 0.2}]}}  # one point of no training
    (tmp_path / "table.json").write_text(json.dumps(table), "utf-8")
    evidence.main([str(tmp_path / "table.json"), str(tmp_path / "out.svg")])
    drawn = (tmp_path / "out.svg").read_text("utf-8")
    assert "adapter: ST-LPIPS (alex)" in drawn and "paper" in drawn and "base-ahead" in drawn
    assert "sampling" not in drawn


def test_a_table_of_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{}", "utf-8")
    with pytest.raises(DAVAEError, match="has no curve"):
        evidence.main([str(tmp_path / "table.json"), str(tmp_path / "out.svg")])
    assert not (tmp_path / "out.svg").exists()
