"""Runs graphs in a real ComfyUI inside this process, without its server. Works on ComfyUI 0.3.75 ... 0.33.0.

    comfy = HeadlessComfy(base, find_comfyui())
    result = comfy.run(graph.prompt, inputs={"image": tensor})
    result.captured["latent"], result.images, result.previews

One per process: ComfyUI keeps its command line, node table and loaded models in module globals. Only the custom nodes
of `base` are loaded. Set `DAVAE_GPU=1` to leave out `--cpu`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from .locate import ComfyUI
from .result import Result, validation_error

log = logging.getLogger(__name__)


class HeadlessComfy:
    """A booted ComfyUI.

    Attributes:
        base: its base directory.
        comfyui: which ComfyUI it is.
        log: what it logged since boot (INFO and above), one entry per record.
        import_failures: the custom nodes and core extras that could not be imported, as the lines of ComfyUI's log.
        nodes: ComfyUI's `nodes` module; `nodes.NODE_CLASS_MAPPINGS` is its node table.
    """

    _booted: Path | None = None

    def __init__(
        self, base: Path, comfyui: ComfyUI, preview_method: str = "latent2rgb", arguments: Sequence[str] = ()
    ) -> None:
        if HeadlessComfy._booted is not None:
            raise RuntimeError(f"ComfyUI already runs in this process on {HeadlessComfy._booted}; use a subprocess")
        HeadlessComfy._booted = self.base = Path(base).resolve()
        self.comfyui = comfyui
        self.log: list[str] = []
        self._interrupt_after: int | None = None
        self._result: Result | None = None
        # Like the server, execute in a thread of its own: a caller may have an event loop running in this one.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="comfyui")
        _collect_log(self.log)
        _put_first(comfyui.root)
        argv = sys.argv
        sys.argv = [
            str(comfyui.root / "main.py"),
            "--base-directory",
            str(self.base),
            "--preview-method",
            preview_method,
            *arguments,
        ]
        if os.environ.get("DAVAE_GPU") != "1":
            sys.argv.append("--cpu")
        try:
            self._boot()
        finally:
            sys.argv = argv

    def _boot(self) -> None:
        import comfy.options

        comfy.options.enable_args_parsing()
        import utils.extra_config

        _check_origin(utils.extra_config, self.comfyui.root)  # custom nodes bring packages called `utils`: ours first
        import nodes

        _check_origin(nodes, self.comfyui.root)
        import execution
        import server

        self.nodes = nodes
        self._execution = execution
        self._server = server.PromptServer.instance = _ServerStandIn(self)
        self._thread.submit(
            lambda: asyncio.run(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
        ).result()
        self.import_failures = [line for line in self.log if "IMPORT FAILED" in line or "Cannot import" in line]
        custom_nodes = str(self.base / "custom_nodes")
        if any(custom_nodes in line for line in self.import_failures):
            about = [line for line in self.log if custom_nodes in line]
            raise RuntimeError("ComfyUI could not import a custom node:\n" + "\n".join(about))
        self._store = sys.modules[nodes.NODE_CLASS_MAPPINGS["HarnessCapture"].__module__].STORE
        # "ram_inactive" is asked for by newer versions and ignored by older ones, like the cache kinds not used here.
        self._executor = execution.PromptExecutor(
            self._server,
            cache_type=execution.CacheType.CLASSIC,
            cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0},
        )
        comfy.utils.set_progress_bar_global_hook(self._on_progress)

    def pack(self, submodule: str = "", install_name: str = "comfyui-davae") -> ModuleType:
        """A module of the pack as ComfyUI loaded it, e.g. `comfy.pack("nodes.loaders")`.

        ComfyUI imports a pack under the path of its folder; importing `davae_core` by name gives a second copy, whose
        classes are not those of the objects in the graph.
        """
        name = str(self.base / "custom_nodes" / install_name).replace(".", "_x_")
        return sys.modules[f"{name}.{submodule}" if submodule else name]

    def interrupt_after(self, events: int) -> None:
        """Cancels the next run, as the Cancel button does, after its `events`-th progress event (one per step)."""
        if events < 1:
            raise ValueError(f"interrupt_after({events}): expected at least 1")
        self._interrupt_after = events

    def run(self, prompt: dict, *, inputs: dict[str, object] | None = None, expect_error: bool = False) -> Result:
        """Runs a prompt in API format.

        Args:
            prompt: `Graph.prompt`, or the content of a workflow exported with "Export (API)".
            inputs: objects for HarnessConstant nodes, by their `key`.
            expect_error: return a failing run with `result.error` set, instead of raising.

        Raises:
            AssertionError: the prompt was not valid or a node failed, unexpectedly; or an expected error did not come.
        """
        result = self._result = Result()
        self._store.inputs, self._store.captured = dict(inputs or {}), result.captured
        try:
            # As over HTTP: plain JSON, and a copy, because the executor writes into the prompt.
            self._thread.submit(self._run, json.loads(json.dumps(prompt)), result).result()
        finally:
            self._store.inputs, self._store.captured = {}, {}
            self._result = self._interrupt_after = None
        if result.error and not expect_error:
            raise AssertionError(str(result.error))
        if expect_error and not result.error:
            raise AssertionError("the graph was expected to fail, but it ran to its end")
        return result

    def reset_cache(self) -> None:
        """Forgets the results of earlier runs, so that every node of the next one executes."""
        self._executor.reset()

    def _run(self, prompt: dict, result: Result) -> None:
        prompt_id = str(uuid.uuid4())
        if hasattr(self._server, "node_replace_manager"):
            self._server.node_replace_manager.apply_replacements(prompt)
        _, error, outputs, node_errors = asyncio.run(self._execution.validate_prompt(prompt_id, prompt, None))
        result.error = validation_error(error, node_errors)  # `valid` is already True when any output is
        if result.error:
            return
        self._server.last_prompt_id = prompt_id
        self._executor.execute(prompt, prompt_id, {"client_id": self._server.CLIENT}, outputs)
        result.take_messages(self._executor.status_messages)
        result.outputs = self._executor.history_result["outputs"]
        result.images = [self._saved(image) for image in result.saved_images()]

    def _saved(self, image: dict) -> Path:
        import folder_paths

        return Path(folder_paths.get_directory_by_type(image["type"]), image["subfolder"], image["filename"])

    def _on_progress(self, value: float, total: float, preview: tuple | None, prompt_id=None, node_id=None) -> None:
        """What ComfyUI's server does at each progress event: stop if cancelled, tell the client, send the preview."""
        import comfy.model_management
        from comfy_execution.progress import get_progress_state

        comfy.model_management.throw_exception_if_processing_interrupted()
        node_id = node_id or self._server.last_node_id
        get_progress_state().update_progress(node_id, value, total, preview)
        if self._result is None:
            return
        self._result.messages.append(("progress", {"value": value, "max": total, "node": node_id}))
        if preview is not None:
            self._result.previews.append(preview[1].copy())  # (format, PIL image, largest size)
        if self._interrupt_after is not None:
            self._interrupt_after -= 1
            if self._interrupt_after == 0:
                self.nodes.interrupt_processing(True)


class _ServerStandIn:
    """The parts of ComfyUI's PromptServer that the executor, the core nodes and custom nodes touch."""

    CLIENT = "harness"

    def __init__(self, comfy: HeadlessComfy) -> None:
        from aiohttp import web

        self._comfy = comfy
        self.client_id: str | None = self.CLIENT
        self.last_node_id: str | None = None
        self.last_prompt_id: str | None = None
        self.sockets_metadata: dict = {}
        self.routes = web.RouteTableDef()
        try:
            from app.node_replace_manager import NodeReplaceManager
        except ModuleNotFoundError:  # older than node replacements
            return
        self.node_replace_manager = NodeReplaceManager()

    def send_sync(self, event: object, data: Any, sid: str | None = None) -> None:
        if self._comfy._result is not None and isinstance(event, str):
            self._comfy._result.messages.append((event, data))

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        self.send_sync("progress_text", {"text": text, "node": node_id})


def _put_first(root: Path) -> None:
    """Makes ComfyUI's top-level modules (`nodes`, `utils`, `server`, `app`, ...) win over folders named like them."""
    if "comfy" in sys.modules:
        raise RuntimeError(
            f"a module `comfy` is already imported from {sys.modules['comfy'].__path__}; ComfyUI needs the name"
        )
    sys.path.insert(0, str(root))


def _check_origin(module: ModuleType, root: Path) -> None:
    if root not in Path(module.__file__ or "").resolve().parents:
        raise RuntimeError(
            f"`import {module.__name__}` gave {module.__file__}, expected ComfyUI's in {root}: something imported that "
            "name before ComfyUI was booted"
        )


def _collect_log(lines: list[str]) -> None:
    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    root = logging.getLogger()
    root.addHandler(Collect(logging.INFO))
    if root.level > logging.INFO:  # ComfyUI logs which custom nodes failed at INFO
        for handler in root.handlers:
            if handler.level == logging.NOTSET:
                handler.setLevel(root.level)
        root.setLevel(logging.INFO)
