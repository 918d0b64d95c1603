"""The headless runner on stock nodes: what a graph gives back, and what it says when it fails."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.graph import Graph
from harness.scratch import PROBE_NAME, make_base

ROOT = Path(__file__).resolve().parents[2]


def inverted_image(color: int = 0x102030) -> Graph:
    g = Graph()
    image = g.node("EmptyImage", width=32, height=32, batch_size=1, color=color)
    inverted = g.node("ImageInvert", image=image)
    g.node("SaveImage", images=inverted, filename_prefix="harness")
    g.node("HarnessCapture", value=inverted, key="inverted")
    return g


def failing_graph() -> Graph:
    """Node 1 raises: it is given no object."""
    g = Graph()
    g.node("HarnessCapture", value=g.node("HarnessConstant", key="nothing given"), key="value")
    return g


def test_stock_graph_gives_the_right_image(comfy):
    result = comfy.run(inverted_image().prompt)
    expected = 1 - torch.tensor([0x10, 0x20, 0x30]) / 255
    torch.testing.assert_close(result.captured["inverted"], expected.expand(1, 32, 32, 3))
    (saved,) = result.images
    assert comfy.base in saved.parents
    assert np.asarray(Image.open(saved))[0, 0].tolist() == [0xEF, 0xDF, 0xCF]


def test_objects_go_in_and_come_out_unchanged(comfy):
    g = Graph()
    g.node("HarnessCapture", value=g.node("HarnessConstant", key="given"), key="taken")
    first, second = object(), object()
    assert comfy.run(g.prompt, inputs={"given": first}).captured["taken"] is first
    assert comfy.run(g.prompt, inputs={"given": second}).captured["taken"] is second  # not the cached one


def test_nodes_run_under_inference_mode(comfy):
    assert comfy.run(inverted_image(0x010101).prompt).captured["inverted"].is_inference()


def test_unchanged_nodes_are_cached_until_the_cache_is_reset(comfy):
    prompt = inverted_image(0x030303).prompt
    assert {"1", "2"} <= set(comfy.run(prompt).executed)
    assert not {"1", "2"} & set(comfy.run(prompt).executed)
    comfy.reset_cache()
    assert {"1", "2"} <= set(comfy.run(prompt).executed)


def test_a_failing_node_is_named(comfy):
    result = comfy.run(failing_graph().prompt, expect_error=True)
    assert (result.error.kind, result.error.node_id, result.error.exception_type) == ("execution", "1", "KeyError")
    assert "nothing given" in result.error.exception_message
    assert "in execute" in result.error.traceback
    with pytest.raises(AssertionError, match="nothing given"):
        comfy.run(failing_graph().prompt)


def test_an_invalid_prompt_is_reported_by_node(comfy):
    g = inverted_image()
    g.prompt["1"]["inputs"]["width"] = "wide"
    result = comfy.run(g.prompt, expect_error=True)
    assert (result.error.kind, result.error.node_id) == ("validation", "1")
    assert "width" in result.error.exception_message
    with pytest.raises(AssertionError, match="width"):
        comfy.run(g.prompt)


def test_one_invalid_output_fails_the_run_although_another_is_valid(comfy):
    g = inverted_image()
    g.node("SaveImage", images=g.node("EmptyImage", width=0, height=32, batch_size=1, color=0), filename_prefix="x")
    assert comfy.run(g.prompt, expect_error=True).error.kind == "validation"


def test_an_unknown_node_is_reported(comfy):
    g = Graph()
    g.node("NoSuchNode")
    error = comfy.run(g.prompt, expect_error=True).error
    assert error.kind == "validation"
    assert "NoSuchNode" in error.exception_message


def test_expecting_an_error_that_does_not_come_fails(comfy):
    with pytest.raises(AssertionError, match="expected to fail"):
        comfy.run(inverted_image().prompt, expect_error=True)


def test_a_preview_arrives_for_every_step(comfy, sampling, add_toy_model):
    add_toy_model(comfy.base)
    result = comfy.run(sampling(steps=4, seed=1).prompt)
    assert [preview.size for preview in result.previews] == [(16, 16)] * 4
    assert result.captured["latent"]["samples"].shape == (1, 16, 16, 16)


def test_a_run_can_be_interrupted_at_a_step_and_the_next_run_is_whole(comfy, sampling, add_toy_model):
    add_toy_model(comfy.base)
    comfy.interrupt_after(2)
    result = comfy.run(sampling(steps=6, seed=2).prompt)
    assert result.interrupted
    assert len(result.previews) == 2
    assert "latent" not in result.captured
    again = comfy.run(sampling(steps=6, seed=2).prompt)
    assert not again.interrupted
    assert len(again.previews) == 6


def test_a_pack_is_reached_as_comfyui_loaded_it(comfy):
    probe = comfy.pack(install_name=PROBE_NAME)
    assert probe.HarnessCapture is comfy.nodes.NODE_CLASS_MAPPINGS["HarnessCapture"]


def test_a_second_comfyui_in_one_process_is_refused(comfy, tmp_path):
    with pytest.raises(RuntimeError, match="already runs"):
        type(comfy)(tmp_path, comfy.comfyui)


@pytest.mark.slow
def test_a_pack_that_cannot_be_imported_stops_the_boot(comfyui, tmp_path):
    broken = tmp_path / "broken-pack"
    broken.mkdir()
    (broken / "__init__.py").write_text("import no_such_module_anywhere\n")
    base = make_base(tmp_path / "base", None, extra_packs=[broken])
    script = f"""
        from pathlib import Path
        from harness.headless import HeadlessComfy
        from harness.locate import ComfyUI
        comfyui = ComfyUI(Path({str(comfyui.root)!r}), {comfyui.version!r}, {comfyui.source!r})
        HeadlessComfy(Path({str(base)!r}), comfyui)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "broken-pack" in done.stderr
    assert "no_such_module_anywhere" in done.stderr
