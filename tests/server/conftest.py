"""Running a workflow file as a person does: open it on the page, press Run, look at what was saved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import workflow
from harness.browser import ComfyPage
from harness.server import RealServer

TO_PROMPT = "async () => (await window.app.graphToPrompt()).output"
# Nodes that the front end does not know, or marks as wrong.
WRONG_NODES = "() => window.app.graph._nodes.filter((n) => n.has_errors || !n.constructor.type).map((n) => n.title)"
# What the front end tells the person at the page, for example that a file does not follow its format.
MESSAGES = ".p-toast-message"
# A dialog over the page, for example about models that are missing.
DIALOGS = ".p-dialog"
OURS = ("uncaught", "/extensions/comfyui-davae/")

RunWorkflow = Callable[[RealServer, ComfyPage, dict, Path], list[Path]]


@pytest.fixture(scope="session")
def run_workflow() -> RunWorkflow:
    """``run_workflow(server, page, content, shot)``: the pictures that were saved; ``shot`` is a picture of the page.

    Screenshots are also copied into the folder that DAVAE_SCREENSHOTS names, for a person to look at.
    """
    return _run_workflow


def _run_workflow(server: RealServer, page: ComfyPage, content: dict, shot: Path) -> list[Path]:
    page.errors.clear()
    page.load_workflow(content)
    assert page.page.evaluate(WRONG_NODES) == []
    converted = workflow.to_prompt(content, server.object_info())
    assert page.page.evaluate(TO_PROMPT) == converted
    assert not page.page.locator(DIALOGS).all_inner_texts()
    before = _saved(server, converted)
    page.queue_and_wait(300)
    page.screenshot(shot)
    if folder := os.environ.get("DAVAE_SCREENSHOTS"):
        shutil.copy(shot, folder)
    assert not [text for text in page.page.locator(MESSAGES).all_inner_texts() if "Invalid" in text]
    assert not [error for error in page.errors if any(word in error for word in OURS)]
    new = _saved(server, converted) - before
    assert len(new) == len(_prefixes(converted))
    return sorted(new)


def _prefixes(prompt: workflow.Prompt) -> list[str]:
    return [node["inputs"]["filename_prefix"] for node in prompt.values() if node["class_type"] == "SaveImage"]


def _saved(server: RealServer, prompt: workflow.Prompt) -> set[Path]:
    return {file for prefix in _prefixes(prompt) for file in (server.base / "output").glob(f"{prefix}_0*.png")}
