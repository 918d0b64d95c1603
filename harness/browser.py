"""ComfyUI's front end in a headless Chromium, driven by Playwright.

with open_comfy(server) as comfy:
    comfy.load_workflow(json.loads(path.read_text()))
    comfy.queue_and_wait()
    comfy.screenshot(path)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .chromium import MISSING, find_chromium
from .server import RealServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

# Nothing but the server on the loopback address is ever looked up: the front end asks for fonts and news elsewhere.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]
ARGUMENTS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

PATIENCE = 300_000  # milliseconds: a machine under load is slow, not wrong

READY = "() => Boolean(window.app?.graph && window.app?.extensionManager)"

NODE_IDS = "() => window.app.graph._nodes.map((node) => Number(node.id)).sort((a, b) => a - b)"

# Resolves to {event, detail}: how the run ended, or "rejected" with the server's validation errors.
QUEUE = """
async (milliseconds) => {
  const app = window.app;
  const ends = ['execution_success', 'execution_error', 'execution_interrupted'];
  let finish;
  const finished = new Promise((resolve) => { finish = resolve; });
  const listener = (message) => finish({ event: message.type, detail: message.detail });
  for (const name of ends) app.api.addEventListener(name, listener);
  const timer = setTimeout(() => finish({ event: 'timeout', detail: null }), milliseconds);
  await app.queuePrompt(0, 1);
  const errors = app.lastNodeErrors;
  if (errors && Object.keys(errors).length) finish({ event: 'rejected', detail: errors });
  const result = await finished;
  clearTimeout(timer);
  for (const name of ends) app.api.removeEventListener(name, listener);
  return result;
}
"""


class ComfyPage:
    """ComfyUI's page.

    Attributes:
        page: Playwright's Page, for everything that has no method here.
        errors: uncaught exceptions and console errors so far, without failed look-ups of other hosts.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        page.on("console", self._on_console)
        page.set_default_timeout(PATIENCE)
        page.goto(url, timeout=PATIENCE)
        page.wait_for_function(READY)

    def load_workflow(self, workflow: dict) -> None:
        """Opens a workflow in the UI's format on the canvas.

        Newer front ends open one of their own a moment after the page is ready; then ours is opened again.
        """
        wanted = sorted(node["id"] for node in workflow["nodes"])
        for _ in range(10):
            self.page.evaluate("async (workflow) => { await window.app.loadGraphData(workflow); }", workflow)
            self.page.wait_for_timeout(250)
            if self.page.evaluate(NODE_IDS) == wanted:
                return
        raise AssertionError("the front end does not keep the workflow open")

    def queue_and_wait(self, timeout: float = 120.0) -> None:
        """Presses Run and waits for the end of the run.

        Raises:
            AssertionError: the run failed, was interrupted or rejected, or did not end within `timeout` seconds.
        """
        end = self.page.evaluate(QUEUE, timeout * 1000)
        if end["event"] != "execution_success":
            raise AssertionError(f"the run ended with {end['event']}: {end['detail']}")

    def node_types(self) -> set[str]:
        """The ids of all nodes that the front end knows."""
        return set(self.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)"))

    def screenshot(self, path: Path, settle: float = 0.5) -> Path:
        """Writes what the window shows as a PNG file, after `settle` seconds in which images may still appear."""
        self.page.wait_for_timeout(settle * 1000)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))
        return path

    def _on_console(self, message) -> None:
        elsewhere = "Failed to load resource: net::ERR_NAME_NOT_RESOLVED"
        if message.type == "error" and not message.text.startswith(elsewhere):
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")


@contextlib.contextmanager
def open_comfy(server: RealServer, width: int = 1600, height: int = 1000) -> Iterator[ComfyPage]:
    """Opens the server's page in a Chromium of its own.

    Raises:
        FileNotFoundError: there is no Chromium on this machine.
    """
    from playwright.sync_api import sync_playwright

    executable = find_chromium()
    if executable is None:
        raise FileNotFoundError(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS, headless=True)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            yield ComfyPage(page, server.url)
        finally:
            browser.close()
