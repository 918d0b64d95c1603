"""ComfyUI's own server over HTTP and websocket, and its front end in a browser, on stock nodes."""

from __future__ import annotations

import io
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from harness.graph import Graph
from harness.scratch import make_base
from harness.server import RealServer, ServerError

INVERTED_IMAGE = {
    "last_node_id": 3,
    "last_link_id": 2,
    "nodes": [
        {
            "id": 1,
            "type": "EmptyImage",
            "pos": [50, 100],
            "size": [300, 150],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
            "properties": {},
            "widgets_values": [32, 32, 1, 0x102030],
        },
        {
            "id": 2,
            "type": "ImageInvert",
            "pos": [400, 100],
            "size": [200, 50],
            "flags": {},
            "order": 1,
            "mode": 0,
            "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [2]}],
            "properties": {},
        },
        {
            "id": 3,
            "type": "SaveImage",
            "pos": [650, 100],
            "size": [300, 300],
            "flags": {},
            "order": 2,
            "mode": 0,
            "inputs": [{"name": "images", "type": "IMAGE", "link": 2}],
            "outputs": [],
            "properties": {},
            "widgets_values": ["browser"],
        },
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
    "groups": [],
    "config": {},
    "extra": {},
    "version": 0.4,
}


def inverted_image() -> Graph:
    g = Graph()
    image = g.node("EmptyImage", width=32, height=32, batch_size=1, color=0x102030)
    g.node("SaveImage", images=g.node("ImageInvert", image=image), filename_prefix="harness")
    return g


@pytest.mark.server
def test_stock_graph_gives_the_right_png(server):
    result = server.queue(inverted_image().prompt)
    (saved,) = result.saved_images()
    png = server.image(saved)
    assert np.asarray(Image.open(io.BytesIO(png)))[0, 0].tolist() == [0xEF, 0xDF, 0xCF]
    assert result.images[0].read_bytes() == png


@pytest.mark.server
def test_the_server_knows_the_stock_and_the_test_nodes(server):
    assert {"KSampler", "HarnessCapture"} <= set(server.object_info())
    assert "width" in server.object_info("EmptyImage")["EmptyImage"]["input"]["required"]


@pytest.mark.server
def test_a_preview_arrives_for_every_step(server, sampling, add_toy_model):
    add_toy_model(server.base)
    result = server.queue(sampling(steps=4, seed=3).prompt)
    assert [preview.size for preview in result.previews] == [(512, 512)] * 4  # the server enlarges them


@pytest.mark.server
def test_a_failing_node_is_named(server):
    g = Graph()
    g.node("HarnessCapture", value=g.node("HarnessConstant", key="nothing given"), key="value")
    error = server.queue(g.prompt, expect_error=True).error
    assert (error.kind, error.node_id, error.exception_type) == ("execution", "1", "KeyError")
    with pytest.raises(AssertionError, match="nothing given"):
        server.queue(g.prompt)


@pytest.mark.server
def test_an_invalid_prompt_is_reported_by_node(server):
    g = inverted_image()
    g.prompt["1"]["inputs"]["width"] = "wide"
    error = server.queue(g.prompt, expect_error=True).error
    assert (error.kind, error.node_id) == ("validation", "1")


@pytest.mark.server
def test_a_pack_that_cannot_be_imported_stops_the_server(comfyui, tmp_path):
    broken = tmp_path / "broken-pack"
    broken.mkdir()
    (broken / "__init__.py").write_text("import no_such_module_anywhere\n")
    server = RealServer(make_base(tmp_path / "base", None, extra_packs=[broken]), comfyui)
    with pytest.raises(ServerError, match="no_such_module_anywhere"), server:
        pass
    assert_gone(server.url)


@pytest.mark.server
@pytest.mark.slow
def test_an_exception_leaves_no_server_behind(comfyui, tmp_path):
    server = RealServer(make_base(tmp_path, None), comfyui)
    with pytest.raises(ZeroDivisionError), server:
        server.get("/system_stats")
        raise ZeroDivisionError
    assert_gone(server.url)


def assert_gone(url: str) -> None:
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/system_stats", timeout=5)


@pytest.mark.server
@pytest.mark.browser
def test_a_workflow_runs_in_the_browser(server, browser_page, tmp_path):
    assert {"EmptyImage", "HarnessCapture"} <= browser_page.node_types()
    browser_page.load_workflow(INVERTED_IMAGE)
    browser_page.queue_and_wait()
    (saved,) = server.base.joinpath("output").glob("browser*.png")
    assert np.asarray(Image.open(saved))[0, 0].tolist() == [0xEF, 0xDF, 0xCF]
    shot = Image.open(browser_page.screenshot(tmp_path / "canvas.png"))
    assert shot.size == (1600, 1000)
    assert len(shot.convert("RGB").resize((80, 50)).getcolors(4000)) > 10  # something is drawn
    assert not [error for error in browser_page.errors if error.startswith("uncaught")]


@pytest.mark.server
@pytest.mark.browser
def test_a_failing_workflow_is_reported_by_the_browser(browser_page):
    broken = {**INVERTED_IMAGE, "nodes": [dict(node) for node in INVERTED_IMAGE["nodes"]]}
    broken["nodes"][0]["widgets_values"] = [32, 32, 1, -5]
    browser_page.load_workflow(broken)
    with pytest.raises(AssertionError, match="the run ended with"):
        browser_page.queue_and_wait(timeout=30)
