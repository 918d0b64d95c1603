"""How the benchmarks count, time, judge and report; no model of any size is run here."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bounds, cases, report, sides, timing
from benchmarks.charts import Chart, Line, render
from benchmarks.cost import Cost
from benchmarks.record import CaseResult, SideResult, case_from_json
from benchmarks.setup import Setup
from benchmarks.sides import COMFY, CORE, Side
from davae_core.errors import DAVAEError
from davae_core.evaluation.figures import write_json

SD35 = Setup()


def result(name: str = "decode 128", first: float = 1.0, second: float = 2.0) -> CaseResult:
    made = (
        SideResult("one", timing.Seconds((first, first)), Cost(4e12, 1e9), 100, {"shared": 0.97}),
        SideResult("other", timing.Seconds((second, second)), Cost(2e12, 1e9), 80),
    )
    return CaseResult(name, "one / other", SD35.to_json(), made)


def test_the_operations_of_sd35_medium_are_those_of_the_arithmetic() -> None:
    """10.8 and 2.14 TFLOP for each picture at 1024 px, and there are two with CFG."""
    native, adapted = (sides.count(Side(what, 1024), SD35) for what in ("native", "adapted"))
    assert native is not None and adapted is not None
    assert native.flops / 2 == pytest.approx(10.8e12, rel=0.01)
    assert adapted.flops / 2 == pytest.approx(2.14e12, rel=0.01)


def test_equal_tokens_cost_the_same_but_for_the_embedder_and_the_head() -> None:
    few = Setup(blocks=2)
    adapted, native = sides.count(Side("adapted", 512), few), sides.count(Side("native", 256), few)
    assert adapted is not None and native is not None
    assert 1 < adapted.flops / native.flops < 1.01


def test_bytes_are_at_least_the_weights_and_halve_with_the_dtype() -> None:
    single = sides.count(Side("native", 256), Setup(blocks=2))
    half = sides.count(Side("native", 256), Setup(blocks=2, dtype="bf16"))
    assert single is not None and half is not None
    assert single.bytes > 4 * 180e6  # two blocks have 186 million weights
    assert 0.45 < half.bytes / single.bytes < 0.6
    assert half.flops == single.flops


def test_a_call_without_guidance_is_half_of_one_with_it() -> None:
    one, both = (sides.count(Side(what, 1024), SD35) for what in ("adapted, no guidance", "adapted"))
    assert one is not None and both is not None
    assert one.flops / both.flops == pytest.approx(0.5, abs=1e-3)


def test_a_picture_is_summed_up_from_its_parts_and_judged() -> None:
    made = replace(result("four steps 2048 ComfyUI"), sums={"native": 310.0, "adapted": 5.0, "tiny": 4.0})
    assert made.figure("sum") == 62.0 and result().figure("sum") is None
    (bound,) = bounds.judge([made], bounds.FULL)
    assert (bound.value, bound.at_least, bound.passed) == (62.0, 40.0, True)
    assert case_from_json(json.loads(json.dumps(made.to_json()))).sums == made.sums
    row = report._row(made, "sum")
    assert row == ["native / adapted (sums of parts; tiny: 4 s)", "310 s", "5 s", "62.0", "", ">= 40", "kept"]


def test_the_case_of_few_steps_sums_up_calls_that_it_times() -> None:
    for case in cases.everything(gpu=False):
        assert all(place < len(case.sides) for parts in case.sums.values() for place in parts)
    (case,) = (case for case in cases.everything(gpu=False) if case.name == "four steps 2048 ComfyUI")
    assert [list(parts.values()) for parts in case.sums.values()][:2] == [[30, 1], [4, 1]]


def test_sides_are_taken_in_turn_after_a_warm_up() -> None:
    made: list[str] = []
    taken = timing.in_turn([lambda: made.append("a"), lambda: made.append("b")], rounds=3, budget=60, warm_up=1)
    assert made == ["a", "b"] * 4
    assert [len(seconds.all) for seconds in taken] == [3, 3]


def test_a_budget_that_is_spent_ends_the_rounds() -> None:
    made: list[int] = []
    timing.in_turn([lambda: made.append(0)], rounds=50, budget=0.0, warm_up=0)
    assert len(made) < 50


def test_median_and_quartiles() -> None:
    seconds = timing.Seconds((5.0, 1.0, 3.0, 2.0, 4.0))
    assert seconds.median == 3.0 and seconds.quartiles == (2.0, 4.0)
    assert timing.ratio(seconds, timing.Seconds((1.0,) * 5)).median == 3.0


def test_a_limit_is_judged_on_its_case_alone() -> None:
    limits = [bounds.Limit("decode 128", "time", at_most=0.6), bounds.Limit("decode 128", "memory", at_most=1.2)]
    limits += [bounds.Limit("decode 128", "shared", at_least=0.9), bounds.Limit("another", "time", at_most=0.1)]
    time, memory, shared = bounds.judge([result()], limits)
    assert (time.value, time.passed) == (0.5, True)
    assert (memory.value, memory.passed) == (1.25, False)
    assert (shared.value, shared.passed) == (0.97, True)


@pytest.mark.parametrize("gpu", [True, False])
def test_every_limit_belongs_to_a_case_and_names_are_unique(gpu: bool) -> None:
    names = [case.name for case in [*cases.everything(gpu), *cases.quick()]]
    assert len(names) == len(set(names))
    of_a_gpu = {f"picture 2048 batch 1 {COMFY}"}
    wanted = {limit.case for limit in (*bounds.FULL, *bounds.QUICK)}
    wanted -= {"full depth 1024", "full depth 2048"} if gpu else of_a_gpu
    assert wanted <= set(names)


@pytest.mark.parametrize("gpu", [True, False])
def test_every_side_of_a_case_can_be_built(gpu: bool) -> None:
    for case in [*cases.everything(gpu), *cases.quick()]:
        for side in case.sides:
            assert side.what in sides.BUILDERS or (case.alone and side.what in sides.ALONE), side


def test_an_unknown_side_is_refused_with_those_there_are() -> None:
    with pytest.raises(DAVAEError, match=r"no side 'magic'; there are native, adapted"):
        sides.build(Side("magic"), SD35)


def test_results_survive_being_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    told = {
        "command": "python3 dev.py bench --quick", "date": "2026-01-02", "setup": SD35.to_json(),
        "machine": {"cpu": "A processor", "threads": 2, "torch": "2.0"}, "cases": [result().to_json()],
        "left_out": {"decode 4096": "no memory"},
    }  # fmt: skip
    write_json(path, told)
    read = report.read(path)
    assert read["results"] == [result()]
    table = report.markdown(read)
    assert "A processor, 2 threads" in table and "| decode 4096 | left out: no memory |" in table
    assert "| one / other | 1 s (4 TFLOP/s) | 2 s (1 TFLOP/s) | 0.50 (0.50 to 0.50) | 2.00 | <= 1.2 | kept |" in table
    assert "| one / other, weights shared | 97.0% |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_a_file_that_holds_no_results_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"cases": [{}]}), encoding="utf-8")
    with pytest.raises(DAVAEError, match=r"other\.json is no result file"):
        report.read(path)


def grown(name: str, *sides: tuple[str, float]) -> CaseResult:
    made = (SideResult(label, timing.Seconds((seconds,)), None, 2**30) for label, seconds in sides)
    return CaseResult(name, name, SD35.to_json(), tuple(made))


def test_growth_is_read_off_the_sides_of_both_models() -> None:
    native, adapted = Side("native", 512).label, Side("adapted", 512).label
    route = [Side(what, 512, COMFY).label for what in ("native", "adapted")]
    results = [
        grown(f"equal size 512 {CORE}", (native, 9.0), (adapted, 9.0)),
        grown(f"equal size 512 {COMFY}", (route[0], 4.0), (route[1], 1.0)),
        grown("batch 1", (native, 5.0), (adapted, 1.5)),
        grown("batch 4", (Side("native", 512, batch=4).label, 16.0), (Side("adapted", 512, batch=4).label, 4.0)),
        grown(f"equal tokens 1024 {COMFY}", (Side("adapted", 1024, COMFY).label, 4.0), (route[0], 4.1)),
    ]
    time, memory, by_batch, _ = report.scaling(results)
    assert time.lines == (Line("native", ((512.0, 4.0),)), Line("adapted", ((512.0, 1.0), (1024.0, 4.0))))
    assert by_batch.lines == (Line("native", ((1.0, 5.0), (4.0, 16.0))), Line("adapted", ((1.0, 1.5), (4.0, 4.0))))
    assert memory.lines[1].points == ((512.0, 1.0),)


def test_a_chart_has_its_words_and_leaves_out_what_has_no_points() -> None:
    chart = Chart("A < B", "x", "seconds", (Line("one", ((1, 0.02), (4, 3.0))), Line("none", ())))
    root = ET.fromstring(render([chart, Chart("empty", "x", "y", ())]))
    words = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"A < B", "x", "seconds", "one"} <= words and not {"none", "empty"} & words
    marks = [
        element for element in root.iter() if element.tag.endswith("use") and "line2d" not in element.get("id", "")
    ]
    assert len(marks) >= 2 and render([chart]) == render([chart])


def test_a_case_that_would_take_too_long_is_left_out_with_the_reason() -> None:
    from benchmarks.__main__ import Runner

    runner = Runner(SD35, limit=10.0, rate=1e11)
    case = cases.Case("large", "", (Side("native", 1024), Side("adapted", 1024, CORE)))
    assert runner.run(case) is None
    assert "more than --limit 10" in runner.left_out["large"]


def test_the_peak_of_a_call_is_what_it_touches() -> None:
    from benchmarks import memory

    torch.ones(4 * 2**20)  # glibc keeps tensors of this size from now on
    held = [torch.ones(4 * 2**20) for _ in range(24)]  # as in a process that has had much in memory
    del held[:-1]
    found = memory.peak(lambda: torch.ones(64 * 2**20), "cpu")  # 256 MiB
    assert 200 * 2**20 <= found <= 400 * 2**20 and len(held) == 1
