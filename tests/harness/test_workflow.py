"""Workflow files to prompts: names for widget values, links, nodes that are left out, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from harness.headless import HeadlessComfy
from harness.workflow import WorkflowError, find, load, read, schemas, to_prompt, with_values


def node(key: int, type: str, widgets: list | dict | None = None, **more: object) -> dict:
    return {"id": key, "type": type, "mode": 0, "inputs": [], "outputs": [], "widgets_values": widgets or [], **more}


def workflow(*nodes: dict, links: list[list] | None = None, **more: object) -> dict:
    return {"nodes": list(nodes), "links": links or [], "groups": [], "version": 0.4, **more}


@pytest.fixture(scope="module")
def info(comfy: HeadlessComfy) -> dict:
    """The schemas of all nodes of the real ComfyUI."""
    return schemas(comfy.nodes, comfy.nodes.NODE_CLASS_MAPPINGS)


@pytest.fixture
def chain() -> dict:
    """EmptyImage -> ImageInvert -> SaveImage."""
    source = node(1, "EmptyImage", [64, 32, 1, 0x102030], outputs=[{"name": "IMAGE", "type": "IMAGE"}])
    image = [{"name": "image", "type": "IMAGE", "link": 1}]
    middle = node(2, "ImageInvert", inputs=image, outputs=[{"name": "IMAGE", "type": "IMAGE"}])
    end = node(3, "SaveImage", ["here"], inputs=[{"name": "images", "type": "IMAGE", "link": 2}], title="Result")
    return workflow(source, middle, end, links=[[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]])


def test_values_get_their_names_and_links_their_ends(chain: dict, info: dict) -> None:
    prompt = to_prompt(chain, info)
    assert prompt["1"]["inputs"] == {"width": 64, "height": 32, "batch_size": 1, "color": 0x102030}
    assert prompt["2"]["inputs"] == {"image": ["1", 0]}
    assert prompt["3"] == {
        "inputs": {"images": ["2", 0], "filename_prefix": "here"},
        "class_type": "SaveImage",
        "_meta": {"title": "Result"},
    }


def test_a_converted_workflow_runs(chain: dict, info: dict, comfy: HeadlessComfy) -> None:
    assert len(comfy.run(to_prompt(chain, info)).images) == 1


def test_what_happens_to_the_seed_after_a_run_is_no_input(info: dict) -> None:
    inputs = to_prompt(workflow(node(1, "KSampler", [7, "randomize", 20, 8.0, "euler", "simple", 1.0])), info)["1"]
    assert inputs["inputs"] == {
        "seed": 7, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip


def test_the_upload_button_is_no_input(info: dict) -> None:
    for widgets in (["photo.png", "image"], ["photo.png"]):
        assert to_prompt(workflow(node(1, "LoadImage", widgets)), info)["1"]["inputs"] == {"image": "photo.png"}


def test_an_optional_widget_may_have_come_after_the_workflow_was_saved(info: dict) -> None:
    """Then the node has its default, as in the browser."""
    schema = {"required": {"size": ["INT", {}]}, "optional": {"decoder": [["full", "fast"], {"default": "full"}]}}
    told = {**info, "Later": {**info["ImageInvert"], "input": schema}}
    for saved, inputs in (([5], {"size": 5, "decoder": "full"}), ([5, "fast"], {"size": 5, "decoder": "fast"})):
        assert to_prompt(workflow(node(1, "Later", saved)), told)["1"]["inputs"] == inputs
    for saved in ([], [5, "fast", 1]):
        with pytest.raises(WorkflowError, match="saved values"):
            to_prompt(workflow(node(1, "Later", saved)), told)


def test_a_widget_with_a_link_takes_the_link(chain: dict, info: dict) -> None:
    chain["nodes"][0]["inputs"] = [{"name": "width", "type": "INT", "widget": {"name": "width"}, "link": 3}]
    chain["nodes"].append(node(4, "PrimitiveInt", [96, "fixed"], outputs=[{"name": "INT", "type": "INT"}]))
    chain["links"].append([3, 4, 0, 1, 0, "INT"])
    assert to_prompt(chain, info)["1"]["inputs"]["width"] == ["4", 0]


def test_notes_are_left_out(chain: dict, info: dict) -> None:
    chain["nodes"] += [node(8, "Note", ["text"]), node(9, "MarkdownNote", ["# text"])]
    assert set(to_prompt(chain, info)) == {"1", "2", "3"}


def test_a_muted_node_takes_its_links_away(chain: dict, info: dict) -> None:
    chain["nodes"][1]["mode"] = 2
    prompt = to_prompt(chain, info)
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"] == {"filename_prefix": "here"}


def test_a_bypassed_node_hands_its_input_on(chain: dict, info: dict) -> None:
    chain["nodes"][1]["mode"] = 4
    prompt = to_prompt(chain, info)
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"]["images"] == ["1", 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["nodes"].append(node(5, "Reroute")), r"node 5 \(Reroute\) exists in the browser alone"),
        (lambda w: w["nodes"].append(node(5, "PrimitiveNode")), r"node 5 \(PrimitiveNode\)"),
        (lambda w: w["nodes"].append(node(5, "NoSuchNode")), r"node 5 \(NoSuchNode\): this ComfyUI has no such node"),
        (lambda w: w["nodes"][0].update(widgets_values=[64]), "1 saved values, but in this ComfyUI the widgets width,"),
        (lambda w: w["nodes"][0].update(widgets_values=[1, 2, 3, 4, 5]), "5 saved values"),
        (lambda w: w["links"].pop(), "'images' has the link 2, which the workflow does not hold"),
        (lambda w: w.update(definitions={"subgraphs": [{}]}), "subgraphs"),
        (
            lambda w: w["nodes"].append(node(5, "CLIPTextEncode", ["a {red|blue} hat"])),
            "braces and comments in 'text' are resolved in the browser",
        ),
    ],
)
def test_what_only_the_front_end_can_resolve_is_refused(chain: dict, info: dict, change, message: str) -> None:
    change(chain)
    with pytest.raises(WorkflowError, match=message):
        to_prompt(chain, info)


def test_a_prompt_is_no_workflow_file(tmp_path: Path) -> None:
    file = tmp_path / "api.json"
    file.write_text('{"1": {"class_type": "EmptyImage", "inputs": {}}}')
    with pytest.raises(WorkflowError, match=r"api\.json is not in the UI's format"):
        read(file)
    file.write_text("{")
    with pytest.raises(WorkflowError, match=r"api\.json is not JSON"):
        read(file)


def test_a_file_is_converted_with_the_schemas_of_this_comfyui(
    chain: dict, info: dict, comfy: HeadlessComfy, tmp_path: Path
) -> None:
    import json

    file = tmp_path / "chain.json"
    file.write_text(json.dumps(chain))
    assert load(file, comfy.nodes) == to_prompt(chain, info)


def test_values_are_set_by_title_or_by_class_in_a_copy(chain: dict, info: dict) -> None:
    prompt = to_prompt(chain, info)
    untouched = copy.deepcopy(prompt)
    changed = with_values(with_values(prompt, "Result", filename_prefix="there"), "EmptyImage", width=8, height=16)
    assert changed["3"]["inputs"] == {"images": ["2", 0], "filename_prefix": "there"}
    assert (changed["1"]["inputs"]["width"], changed["1"]["inputs"]["height"]) == (8, 16)
    assert prompt == untouched


def test_values_that_have_no_place_are_refused(chain: dict, info: dict) -> None:
    prompt = to_prompt(chain, info)
    with pytest.raises(WorkflowError, match=r"no nodes are called 'Prompt'; the titles are .*'Result'"):
        with_values(prompt, "Prompt", text="x")
    with pytest.raises(WorkflowError, match="'Result' has no widget 'text'"):
        with_values(prompt, "Result", text="x")
    with pytest.raises(WorkflowError, match="'Result' has no widget 'images'"):
        with_values(prompt, "Result", images="x")


def test_a_name_that_two_nodes_share_is_refused(chain: dict, info: dict) -> None:
    chain["nodes"].append({**copy.deepcopy(chain["nodes"][2]), "id": 4})
    with pytest.raises(WorkflowError, match="2 nodes are called 'Result'"):
        find(to_prompt(chain, info), "Result")
