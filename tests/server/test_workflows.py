"""The shipped workflows in ComfyUI's own front end: it reads them as the converter does, and runs them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from harness import workflow
from harness.browser import ComfyPage
from harness.demo import FOLDER
from harness.server import RealServer

pytestmark = pytest.mark.server

TO_PROMPT = "async () => (await window.app.graphToPrompt()).output"
TINY = sorted(path.stem for path in FOLDER.glob("tiny_*.json"))


def test_the_workflows_are_offered_as_templates(server: RealServer) -> None:
    offered = server.get_json("/workflow_templates")["comfyui-davae"]
    assert set(offered) == {path.stem for path in FOLDER.glob("*.json")}
    for name in offered:
        served = server.get(f"/api/workflow_templates/comfyui-davae/{name}.json")
        assert json.loads(served) == workflow.read(FOLDER / f"{name}.json")


def test_the_server_runs_a_converted_file(server: RealServer) -> None:
    prompt = workflow.to_prompt(workflow.read(FOLDER / "tiny_davae.json"), server.object_info())
    result = server.queue(workflow.with_values(prompt, "Prompt", text="flat rocket"))
    assert result.images and all(Image.open(file).size for file in result.images)


@pytest.mark.browser
@pytest.mark.parametrize("name", TINY)
def test_the_workflow_loads_runs_and_gives_its_pictures(
    server: RealServer, module_page: ComfyPage, name: str, run_workflow, tmp_path: Path
) -> None:
    """No node is red, and the front end reads the file as the converter does."""
    pictures = run_workflow(server, module_page, workflow.read(FOLDER / f"{name}.json"), tmp_path / f"{name}.png")
    assert all(Image.open(picture).getextrema() for picture in pictures)


@pytest.mark.browser
def test_muted_and_bypassed_nodes_are_left_out_as_the_front_end_does(
    server: RealServer, module_page: ComfyPage
) -> None:
    """Modes 2 and 4, on every node of the DA-VAE workflow in turn."""
    content, info = workflow.read(FOLDER / "tiny_davae.json"), server.object_info()
    for index, node in enumerate(content["nodes"]):
        for mode in (workflow.MUTED, workflow.BYPASSED):
            changed = copy.deepcopy(content)
            changed["nodes"][index]["mode"] = mode
            module_page.load_workflow(changed)
            there = module_page.page.evaluate(TO_PROMPT)
            assert there == workflow.to_prompt(changed, info), f"{node['title']}, mode {mode}"
