"""The shipped workflows in ComfyUI's own front end: it reads them as the converter does, and runs them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from harness import workflow
from harness.browser import ComfyPage
from harness.demo import FOLDER, WORKFLOWS
from harness.server import RealServer
from harness.untrained import provide_tiny

pytestmark = pytest.mark.server

TO_PROMPT = "async () => (await window.app.graphToPrompt()).output"
# Nodes that the front end does not know, or marks as wrong.
WRONG_NODES = "() => window.app.graph._nodes.filter((n) => n.has_errors || !n.constructor.type).map((n) => n.title)"
# What the front end tells the person at the page, for example that a file does not follow its format.
MESSAGES = ".p-toast-message"


@pytest.fixture(scope="module", autouse=True)
def tiny_models(server: RealServer) -> None:
    provide_tiny(server.base / "models")


def test_the_workflows_are_offered_as_templates(server: RealServer) -> None:
    offered = server.get_json("/workflow_templates")["comfyui-davae"]
    assert set(WORKFLOWS) <= set(offered)
    for name in WORKFLOWS:
        served = server.get(f"/api/workflow_templates/comfyui-davae/{name}.json")
        assert json.loads(served) == workflow.read(FOLDER / f"{name}.json")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_server_runs_the_converted_file(server: RealServer, name: str) -> None:
    prompt = workflow.to_prompt(workflow.read(FOLDER / f"{name}.json"), server.object_info())
    result = server.queue(workflow.with_values(prompt, "Prompt", text="flat rocket"))
    assert result.images and all(Image.open(file).size for file in result.images)


@pytest.mark.browser
@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_browser_reads_the_file_as_the_converter_does_and_runs_it(
    server: RealServer, browser_page: ComfyPage, name: str, tmp_path: Path
) -> None:
    content = workflow.read(FOLDER / f"{name}.json")
    browser_page.load_workflow(content)
    assert browser_page.page.evaluate(WRONG_NODES) == []
    converted = workflow.to_prompt(content, server.object_info())
    assert browser_page.page.evaluate(TO_PROMPT) == converted
    before = saved(server, converted)
    browser_page.queue_and_wait()
    assert len(saved(server, converted) - before) == len(prefixes(converted))
    browser_page.screenshot(tmp_path / f"{name}.png")
    assert not [text for text in browser_page.page.locator(MESSAGES).all_inner_texts() if "Invalid" in text]
    ours = ("uncaught", "/extensions/comfyui-davae/")
    assert not [error for error in browser_page.errors if any(word in error for word in ours)]


@pytest.mark.browser
def test_muted_and_bypassed_nodes_are_left_out_as_the_front_end_does(
    server: RealServer, browser_page: ComfyPage
) -> None:
    """Modes 2 and 4, on every node of the DA-VAE workflow in turn."""
    content, info = workflow.read(FOLDER / "tiny_davae.json"), server.object_info()
    for index, node in enumerate(content["nodes"]):
        for mode in (workflow.MUTED, workflow.BYPASSED):
            changed = copy.deepcopy(content)
            changed["nodes"][index]["mode"] = mode
            browser_page.load_workflow(changed)
            there = browser_page.page.evaluate(TO_PROMPT)
            assert there == workflow.to_prompt(changed, info), f"{node['title']}, mode {mode}"


def prefixes(prompt: workflow.Prompt) -> list[str]:
    return [node["inputs"]["filename_prefix"] for node in prompt.values() if node["class_type"] == "SaveImage"]


def saved(server: RealServer, prompt: workflow.Prompt) -> set[Path]:
    return {file for prefix in prefixes(prompt) for file in (server.base / "output").glob(f"{prefix}_0*.png")}
