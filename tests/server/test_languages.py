"""What a person sees of the nodes in ComfyUI's front end: titles and inputs in their language, help, templates."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.browser import ComfyPage
from harness.demo import FOLDER, WORKFLOWS
from harness.locate import REPOSITORY
from harness.server import RealServer

pytestmark = [pytest.mark.server, pytest.mark.browser]

# Adds a node in the middle of the canvas, selects it, and tells what is written on it: title, inputs, widgets, outputs.
# A widget's own socket is named as the widget is.
ADD = """
(type) => {
  const { app, LiteGraph } = window;
  app.graph.clear();
  const node = LiteGraph.createNode(type);
  node.pos = [400, 200];
  app.graph.add(node);
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [0, 0];
  app.canvas.selectNode(node);
  const text = (slot) => slot.label ?? slot.localized_name ?? slot.name;
  const shown = (slots) => Object.fromEntries((slots ?? []).map((slot) => [slot.name, text(slot)]));
  return {
    title: node.getTitle(),
    inputs: { ...shown(node.inputs), ...shown(node.widgets) },
    outputs: (node.outputs ?? []).map(text),
  };
}
"""

# The front end has put its own first graph on the canvas, which would take the place of ours.
STARTED = "() => window.app.extensionManager.workflow.activeWorkflow && window.app.graph._nodes.length"

# Front end 1.32 and others before its pull request 7214 (December 2025) lose the translations of all packs when they
# load a language other than English. There the test puts them back, as they do at their start, and has the nodes read.
LOSES_TRANSLATIONS = (1, 36)
PUT_BACK = """
async (translations) => {
  const provided = document.querySelector('#vue-app').__vue_app__._context.provides;
  const values = Object.getOwnPropertySymbols(provided).map((key) => provided[key]);
  const { global } = values.find((value) => value?.global?.mergeLocaleMessage);
  for (const [language, texts] of Object.entries(translations)) global.mergeLocaleMessage(language, texts);
  await window.app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions');
}
"""


@pytest.fixture(autouse=True)
def language(request: pytest.FixtureRequest, server: RealServer) -> Iterator[str]:
    """The language of the front end; a page that is opened later shows it."""
    settings = server.base / "user" / "default" / "comfy.settings.json"
    before = settings.read_text(encoding="utf-8")
    language = getattr(request, "param", "en")
    settings.write_text(json.dumps({**json.loads(before), "Comfy.Locale": language}), encoding="utf-8")
    yield language
    settings.write_text(before, encoding="utf-8")


@pytest.fixture
def page(browser_page: ComfyPage) -> ComfyPage:
    """The front end in that language, when it has ended its start."""
    browser_page.page.wait_for_function(STARTED)
    return browser_page


def translations(language: str) -> dict:
    return json.loads((REPOSITORY / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", ["zh", "ja"], indirect=True)
def test_nodes_are_shown_in_the_language_of_the_front_end(
    language: str, server: RealServer, page: ComfyPage, tmp_path: Path
) -> None:
    version = importlib.metadata.version("comfyui-frontend-package")
    if tuple(map(int, version.split(".")[:2])) < LOSES_TRANSLATIONS:
        page.page.evaluate(PUT_BACK, server.get_json("/i18n"))
    english = translations("en")
    for node, texts in translations(language).items():
        shown = page.page.evaluate(ADD, node)
        assert shown["title"] == texts["display_name"]
        for name, text in texts.get("inputs", {}).items():
            assert shown["inputs"][name] == text["name"], f"{node}.{name}"
        for key, text in texts["outputs"].items():
            if not english[node]["outputs"][key]["name"].isupper():  # else it is a type's, which ComfyUI translates
                assert shown["outputs"][int(key)] == text["name"], f"{node}, output {key}"
        if node in ("DAVAE_DetailEncode", "DAVAE_Sampler"):
            page.screenshot(tmp_path / f"{language}_{node}.png")


def test_help_and_templates_are_shown(page: ComfyPage, tmp_path: Path) -> None:
    browser = page.page
    browser.evaluate(ADD, "DAVAE_DetailEncode")
    browser.get_by_test_id("info-button").click()
    text = browser.locator(".node-help-content .markdown-content")
    text.get_by_role("heading", name="Detail Encode").wait_for()
    assert "size_rule" in text.inner_text()
    page.screenshot(tmp_path / "help.png")

    pictures = [name for name in WORKFLOWS if (FOLDER / f"{name}.jpg").exists()]
    with contextlib.ExitStack() as waiting:
        answers = [waiting.enter_context(browser.expect_response(f"**/comfyui-davae/{name}.jpg*")) for name in pictures]
        browser.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        for name in WORKFLOWS:
            browser.get_by_test_id(f"template-workflow-{name}").scroll_into_view_if_needed()
    assert [answer.value.status for answer in answers] == [200] * len(pictures)
    page.screenshot(tmp_path / "templates.png")
