"""ComfyUI's own server as a subprocess, driven over HTTP and websocket as its front end does.

with RealServer(base, find_comfyui()) as server:
    result = server.queue(graph.prompt)
    png = server.image(result.saved_images()[0])
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from json import JSONDecodeError, dumps, loads
from pathlib import Path

from .launch import HOST, free_port, server_command, server_environment
from .locate import ComfyUI
from .result import Result, validation_error

PREVIEW_IMAGE = (
    b"\x00\x00\x00\x01"  # first four bytes of a binary message that holds a preview; four bytes of format follow
)


class ServerError(RuntimeError):
    """The server did not start or could not import a custom node; the message holds the end of its log."""


class RealServer:
    """A running server on a free port of the loopback address; a context manager that ends it with all its children.

    Attributes:
        url: where it is.
        arguments: flags of ComfyUI's beside those that a test server always has.
        base: its base directory.
        log_file: what it printed.
    """

    def __init__(
        self,
        base: Path,
        comfyui: ComfyUI,
        python: str | Path = sys.executable,
        boot_timeout: float = 600.0,
        arguments: Sequence[str] = (),
    ) -> None:
        self.base = Path(base).resolve()
        self.comfyui = comfyui
        self.python = python
        self.boot_timeout = boot_timeout
        self.arguments = tuple(arguments)
        self.log_file = self.base / "server.log"
        self.url = ""
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> RealServer:
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        command = server_command(self.python, self.comfyui, self.base, port, cpu=os.environ.get("DAVAE_GPU") != "1")
        command += self.arguments
        group = {"start_new_session": True} if os.name == "posix" else {}
        with self.log_file.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=self.base, env=server_environment(), stdout=output, stderr=subprocess.STDOUT, **group
            )
        try:
            self._wait_until_ready()
            self.check_imports()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if os.name == "posix":
            _kill_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            _kill_group(process, signal.SIGKILL)
        else:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
        process.wait()

    def kill(self) -> None:
        """Ends the server at once, in whatever it does: a power cut."""
        process, self._process = self._process, None
        if process is not None:
            _kill_group(process, signal.SIGKILL) if os.name == "posix" else process.kill()
            process.wait()

    @property
    def ended(self) -> int | None:
        """The exit code of a server that ended by itself."""
        return self._process.poll() if self._process is not None else None

    def log(self) -> str:
        """Everything that the server has printed."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def check_imports(self) -> None:
        """Raises ServerError where a custom node was not imported; the server itself goes on without it."""
        text, folder = self.log(), str(self.base / "custom_nodes")
        wrong = [line for line in text.splitlines() if "IMPORT FAILED" in line or "Cannot import" in line]
        if any(folder in line for line in wrong):
            raise ServerError("ComfyUI could not import a custom node:\n" + text)

    def object_info(self, node: str = "") -> dict:
        """What the front end is told of all nodes, or of one."""
        return self.get_json(f"/object_info/{node}" if node else "/object_info")

    def history(self, prompt_id: str) -> dict:
        """The record of a finished run."""
        return self.get_json(f"/history/{prompt_id}")[prompt_id]

    def image(self, image: dict) -> bytes:
        """The file behind one of `result.saved_images()`."""
        return self.get(f"/view?{urllib.parse.urlencode(image)}")

    def queue(self, prompt: dict, *, timeout: float = 300.0, expect_error: bool = False) -> Result:
        """Queues a prompt in API format and waits for its end. Errors are treated as in `HeadlessComfy.run`."""
        result = _in_thread(self._queue(prompt, timeout))
        if result.error and not expect_error:
            raise AssertionError(str(result.error))
        if expect_error and not result.error:
            raise AssertionError("the graph was expected to fail, but it ran to its end")
        return result

    def get(self, path: str) -> bytes:
        """The body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=300) as response:
            return response.read()

    def get_json(self, path: str) -> dict:
        """The decoded body of a GET request."""
        return loads(self.get(path))

    def post_json(self, path: str, body: dict) -> dict:
        """The decoded answer to a POST request; also where ComfyUI answers 400 with its reasons."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            answer = error.read()
            try:
                return loads(answer)
            except JSONDecodeError:
                raise error from None
        return loads(answer) if answer else {}

    async def _queue(self, prompt: dict, timeout: float) -> Result:
        import aiohttp

        result, client = Result(), uuid.uuid4().hex
        address = f"{self.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            answer = await asyncio.to_thread(self.post_json, "/prompt", {"prompt": prompt, "client_id": client})
            result.error = validation_error(answer.get("error"), answer.get("node_errors") or {})
            if "prompt_id" not in answer:  # it is there, in spite of errors, when any output is valid
                return result
            try:
                await asyncio.wait_for(_listen(socket, answer["prompt_id"], result), timeout)
            except asyncio.TimeoutError:
                raise TimeoutError(
                    f"the graph did not end within {timeout} s; its log ends:\n{self.log()[-3000:]}"
                ) from None
        result.take_messages(result.messages)
        if result.error is None and not result.interrupted:
            result.outputs = self.history(answer["prompt_id"])["outputs"]
            result.images = [self.base / "output" / i["subfolder"] / i["filename"] for i in result.saved_images()]
        return result

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.boot_timeout
        while time.monotonic() < end:
            if self._process is not None and self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended with code {self._process.returncode}:\n{self.log()[-5000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI was not ready after {self.boot_timeout:.0f} s:\n{self.log()[-5000:]}")


async def _listen(socket, prompt_id: str, result: Result) -> None:
    """Collects messages and previews until the server says that nothing of this prompt is executing any more."""
    from PIL import Image

    async for message in socket:
        if isinstance(message.data, bytes):
            if message.data[:4] == PREVIEW_IMAGE:
                result.previews.append(Image.open(io.BytesIO(message.data[8:])).copy())
            continue
        if not isinstance(message.data, str):
            break
        event = loads(message.data)
        if event["data"].get("prompt_id", prompt_id) != prompt_id:
            continue
        result.messages.append((event["type"], event["data"]))
        if event["type"] == "executing" and event["data"]["node"] is None:
            return
    raise ConnectionError("ComfyUI closed the websocket before the graph had ended")


def _in_thread(work: Coroutine) -> Result:
    """Runs a coroutine where no event loop can be running yet; Playwright keeps one in the caller's thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _kill_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
