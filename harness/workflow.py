"""Workflow files (what "Save" writes in ComfyUI's browser page) as prompts in API format.

prompt = load(path, comfy.nodes)
prompt = with_values(prompt, "Prompt", text="3d peach")

Gives what the front end's own "Export (API)" gives, for files made of ordinary nodes. A file keeps the values of a
node's widgets as a list without names; the names are in the running ComfyUI's node schemas. What only the front end can
resolve (reroutes, primitives, subgraphs, wildcards in texts) is refused by name.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

Prompt = dict[str, dict[str, Any]]

NOTES = {"Note", "MarkdownNote"}
VIRTUAL = {"Reroute", "PrimitiveNode"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
MUTED, BYPASSED = 2, 4
# An extra widget, which the front end adds and keeps for itself.
EXTRA = "(front end only)"
WILDCARD = re.compile(r"[{}]|//|/\*")


class WorkflowError(ValueError):
    """A workflow that cannot be converted, or a value that has no place in it; the message names the node."""


def read(path: Path) -> dict[str, Any]:
    """A workflow file.

    Raises:
        WorkflowError: it is not one in the UI's format.
    """
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        raise WorkflowError(f"{path.name} is not JSON: {problem}") from problem
    if not isinstance(workflow, dict) or "nodes" not in workflow or "links" not in workflow:
        raise WorkflowError(f'{path.name} is not in the UI\'s format ("Save"): it has no lists of nodes and links')
    return workflow


def schemas(nodes: ModuleType, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What conversion needs of ``/object_info``, without a server.

    Args:
        nodes: ComfyUI's module of that name.
        names: the classes wanted; unknown ones are left out.
    """
    found = {name: nodes.NODE_CLASS_MAPPINGS[name] for name in names if name in nodes.NODE_CLASS_MAPPINGS}
    titles = nodes.NODE_DISPLAY_NAME_MAPPINGS
    return {name: {"input": node.INPUT_TYPES(), "display_name": titles.get(name)} for name, node in found.items()}


def load(path: Path, nodes: ModuleType) -> Prompt:
    """The prompt of a workflow file in this process's ComfyUI; see :func:`read`, :func:`schemas`, :func:`to_prompt`."""
    workflow = read(path)
    return to_prompt(workflow, schemas(nodes, {node["type"] for node in workflow["nodes"]}))


def to_prompt(workflow: Mapping[str, Any], info: Mapping[str, Mapping[str, Any]]) -> Prompt:
    """The prompt of a workflow.

    Args:
        workflow: the content of a file in the UI's format.
        info: node schemas by class: ``/object_info`` of a server, or :func:`schemas`.

    Raises:
        WorkflowError: a node is unknown, or cannot be converted without the front end.
    """
    if (workflow.get("definitions") or {}).get("subgraphs"):
        raise WorkflowError("the workflow holds subgraphs; unpack them in the browser and save it again")
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt: Prompt = {}
    for key, node in nodes.items():
        if node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] in VIRTUAL:
            raise WorkflowError(f"{_name(node)} exists in the browser alone; connect its ends directly")
        if node["type"] not in info:
            raise WorkflowError(f"{_name(node)}: this ComfyUI has no such node")
        inputs = _widgets(node, info[node["type"]]["input"])
        for entry in node.get("inputs", ()):
            inputs.update(_linked(entry, links, nodes))
        title = node.get("title") or info[node["type"]].get("display_name") or node["type"]
        prompt[str(key)] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return prompt


def find(prompt: Prompt, name: str) -> str:
    """The id of the one node with this title, or of this class.

    Raises:
        WorkflowError: there is none, or more than one.
    """
    found = [key for key, node in prompt.items() if node["_meta"]["title"] == name]
    found = found or [key for key, node in prompt.items() if node["class_type"] == name]
    if len(found) != 1:
        titles = ", ".join(sorted({f"{node['_meta']['title']!r}" for node in prompt.values()}))
        raise WorkflowError(f"{len(found) or 'no'} nodes are called {name!r}; the titles are {titles}")
    return found[0]


def with_values(prompt: Prompt, name: str, **inputs: object) -> Prompt:
    """A copy of the prompt with other widget values in one node.

    Args:
        prompt: from :func:`to_prompt`.
        name: the node's title, or its class.
        inputs: new values by the widgets' names.

    Raises:
        WorkflowError: there is no such node, or it has no such widget.
    """
    prompt = copy.deepcopy(prompt)
    node = prompt[find(prompt, name)]
    for key, value in inputs.items():
        if key not in node["inputs"] or isinstance(node["inputs"][key], list):
            raise WorkflowError(f"the node {name!r} has no widget {key!r} to set")
        node["inputs"][key] = value
    return prompt


def pictures(prompt: Prompt, outputs: Mapping[str, Mapping[str, Any]], base: Path) -> dict[str, Path]:
    """The files of the pictures that a run saved or previewed, by the titles of their nodes.

    Args:
        prompt: what was run.
        outputs: of the run, by node id; see :class:`harness.result.Result`.
        base: the base directory of the ComfyUI that ran it.
    """
    return {
        prompt[node]["_meta"]["title"]: base / image["type"] / image["subfolder"] / image["filename"]
        for node, output in outputs.items()
        for image in output["images"]
    }


def _widgets(node: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Widget values by name."""
    values = node.get("widgets_values") or []
    if isinstance(values, Mapping):  # some nodes of other packs keep names
        return {name: values[name] for name, _, _ in _inputs(inputs) if name in values}
    names: list[str] = []
    fewest = 0  # saved values: optional widgets with a default may have come after the workflow was saved
    for name, kind, options in _inputs(inputs):
        if not _is_widget(kind, options):
            continue
        names.append(name)
        if _has_control(name, kind, options) or options.get("image_upload"):
            names.append(EXTRA)
        if name not in inputs.get("optional", {}) or "default" not in options:
            fewest = len(names) - (names[-1:] == [EXTRA])
    if not fewest <= len(values) <= len(names):
        raise WorkflowError(
            f"{_name(node)} has {len(values)} saved values, but in this ComfyUI the widgets {', '.join(names)}; save "
            "the workflow again in the browser"
        )
    later = {name: options["default"] for name, _, options in _inputs(inputs) if name in names[len(values) :]}
    named = dict(zip(names, values)) | later
    named.pop(EXTRA, None)
    for name, _, options in _inputs(inputs):
        if options.get("dynamicPrompts") and WILDCARD.search(str(named.get(name, ""))):
            raise WorkflowError(f"{_name(node)}: braces and comments in {name!r} are resolved in the browser alone")
    return named


def _inputs(inputs: Mapping[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, type, options) of a schema's inputs, in the order of its widgets."""
    entries = {**inputs.get("required", {}), **inputs.get("optional", {})}
    return [(name, entry[0], entry[1] if len(entry) > 1 else {}) for name, entry in entries.items()]


def _is_widget(kind: Any, options: Mapping[str, Any]) -> bool:
    if options.get("forceInput"):
        return False
    return isinstance(kind, list) or str(kind) in WIDGET_TYPES


def _has_control(name: str, kind: Any, options: Mapping[str, Any]) -> bool:
    """Whether the front end adds a "control after generate" to this widget."""
    return bool(options.get("control_after_generate")) or (str(kind) == "INT" and name in ("seed", "noise_seed"))


def _linked(entry: Mapping[str, Any], links: Mapping[int, tuple], nodes: Mapping[int, Any]) -> dict[str, list]:
    """What a socket is connected to, as an input of the prompt; nothing where it leads to a muted node."""
    link = entry.get("link")
    while link is not None:
        if link not in links:
            raise WorkflowError(f"the input {entry['name']!r} has the link {link}, which the workflow does not hold")
        origin, slot = links[link]
        node = nodes[origin]
        mode = node.get("mode", 0)
        if mode not in (MUTED, BYPASSED):
            return {entry["name"]: [str(origin), slot]}
        link = None if mode == MUTED else _through(node, slot)
    return {}


def _through(node: Mapping[str, Any], slot: int) -> int | None:
    """The link that comes out of a bypassed node: of the input with the output's type, first the one beside it."""
    kind, inputs = node["outputs"][slot]["type"], node.get("inputs", [])
    for entry in [*inputs[slot : slot + 1], *inputs]:
        if entry["type"] == kind:
            return entry.get("link")
    return None


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['id']} ({node.get('title') or node['type']})"
