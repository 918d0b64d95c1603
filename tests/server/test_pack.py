"""The pack on ComfyUI's own server and in its front end, previews on."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from davae_core import tiny
from harness.graph import Graph
from harness.untrained import Family

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def family(server) -> Family:
    toys = Family()
    toys.write(server.base / "models")
    return toys


def picture(adapted: bool = True) -> Graph:
    """Prompt to picture on the tiny model's nodes."""
    g = Graph()
    model = g.node("DAVAE_TinySD35")
    davae = g.node("DAVAE_Loader", davae_name=tiny.AUTOENCODER, dtype="auto")
    prompts = {
        key: g.node("CLIPTextEncode", clip=model[1], text=text)
        for key, text in (("positive", "3d peach"), ("negative", ""))
    }
    common = {"seed": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, **prompts}
    if adapted:
        adapter = g.node("DAVAE_Adapter", model=model, adapter_name=tiny.ADAPTER, strength=1.0)
        latent = g.node(
            "DAVAE_Sampler", model=adapter, adapter_name="(already adapted)", steps=4, cfg=0.0, shift=0.0, width=256,
            height=128, **common,
        )  # fmt: skip
        image = g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0)
    else:
        empty = g.node("EmptySD3LatentImage", width=128, height=64, batch_size=1)
        latent = g.node("KSampler", model=model, steps=4, cfg=2.0, latent_image=empty, **common)
        image = g.node("VAEDecode", samples=latent, vae=davae[1])
    g.node("SaveImage", images=image, filename_prefix="adapted" if adapted else "native")
    return g


def png(server, result) -> Image.Image:
    (saved,) = result.saved_images()
    return Image.open(io.BytesIO(server.image(saved)))


def test_base_and_adapted_models_sample_in_turn_with_previews(server, family):
    images = []
    for adapted in (True, False, True, False):
        graph = picture(adapted)
        for node in graph.prompt.values():  # a new seed, so that nothing comes out of the cache
            if "seed" in node["inputs"]:
                node["inputs"]["seed"] = 100 + len(images) // 2
        result = server.queue(graph.prompt)
        assert len(result.previews) == 4
        images.append(png(server, result))
    assert [image.size for image in images] == [(256, 128), (128, 64)] * 2
    assert images[0].tobytes() != images[2].tobytes()


def test_an_error_reaches_the_client_in_the_words_of_the_graph(server, family):
    g = picture()
    sampler = next(node for node in g.prompt.values() if node["class_type"] == "DAVAE_Sampler")
    sampler["inputs"]["model"] = ["1", 0]
    error = server.queue(g.prompt, expect_error=True).error
    assert "not adapted" in error.exception_message and "DA-VAE Adapter" in error.exception_message


def test_help_pages_are_served(server):
    for node in (name for name in server.object_info() if name.startswith("DAVAE_")):
        assert server.get(f"/extensions/comfyui-davae/docs/{node}.md").startswith(b"# "), node


@pytest.mark.browser
def test_the_graph_can_be_put_together_and_run_in_the_browser(server, browser_page, family, tmp_path):
    """The front end builds the graph from its nodes, as a user does, and keeps every link and widget."""
    assert {"DAVAE_Loader", "DAVAE_Sampler", "DAVAE_DetailDecode"} <= browser_page.node_types()
    browser_page.page.evaluate("(prompt) => window.app.loadApiJson(prompt, 'graph.json')", picture().prompt)
    browser_page.page.wait_for_function("() => window.app.graph._nodes.length === 8")
    browser_page.queue_and_wait()
    files = sorted((server.base / "output").glob("adapted*.png"))
    assert Image.open(files[-1]).size == (256, 128)
    browser_page.screenshot(tmp_path / "graph.png")
    assert not [error for error in browser_page.errors if error.startswith("uncaught") or "comfyui-davae" in error]
