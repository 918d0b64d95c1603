"""What came out of one run of a graph; the same for the headless runner and the real server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class GraphError:
    """Why a graph failed.

    Attributes:
        kind: "validation" (nothing ran) or "execution".
        exception_message: what the person at the graph reads.
        node_id: the node it happened in; None where the prompt as a whole is wrong.
        exception_type: the exception's qualified name, or the type of the validation error.
        traceback: the node's traceback, empty for validation errors.
        node_errors: all validation errors by node id.
    """

    kind: str
    exception_message: str
    node_id: str | None
    exception_type: str | None
    traceback: str
    node_errors: dict = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"node {self.node_id}" if self.node_id else "the prompt"
        return (
            f"{self.kind} failed at {where}: {self.exception_type}: {self.exception_message}\n{self.traceback}".rstrip()
        )


@dataclass
class Result:
    """One run.

    Attributes:
        captured: objects kept by HarnessCapture nodes, by key (headless only).
        images: the files that SaveImage wrote (a cached SaveImage names the earlier run's).
        outputs: what the nodes sent to the front end, by node id.
        messages: (event, data) as sent to the client, in order.
        previews: the preview images of the samplers, as PIL images.
        interrupted: the run was cancelled before its end.
        error: why it failed, or None.
    """

    captured: dict[str, object] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    outputs: dict[str, dict] = field(default_factory=dict)
    messages: list[tuple[str, dict]] = field(default_factory=list)
    previews: list = field(default_factory=list)
    interrupted: bool = False
    error: GraphError | None = None

    @property
    def executed(self) -> list[str]:
        """The ids of the nodes that ran, in order; cached ones are not in it."""
        return [data["node"] for event, data in self.messages if event == "executing" and data["node"] is not None]

    def take_messages(self, status: list) -> None:
        """Reads success, interruption and failure out of the executor's (event, data) messages."""
        for event, data in status:
            if event == "execution_interrupted":
                self.interrupted = True
            elif event == "execution_error":
                trace = "".join(data["traceback"])
                self.error = GraphError(
                    "execution", data["exception_message"].strip(), data["node_id"], data["exception_type"], trace
                )

    def saved_images(self) -> list[dict]:
        """ComfyUI's descriptions {filename, subfolder, type} of the images saved to the output folder."""
        images = [image for output in self.outputs.values() for image in output.get("images", ())]
        return [image for image in images if isinstance(image, dict) and image["type"] == "output"]


def validation_error(error: dict | None, node_errors: dict) -> GraphError | None:
    """What ComfyUI's validation said of a prompt, or None where all of it is valid."""
    if not error and not node_errors:
        return None
    lines = [
        f"node {node_id} ({found['class_type']}): {reason['message']}: {reason['details']}"
        for node_id, found in node_errors.items()
        for reason in found["errors"]
    ]
    text = "\n".join(lines) if lines or not error else f"{error['message']} {error['details']}"
    kind = error["type"] if error else "some_outputs_failed_validation"
    return GraphError("validation", text, next(iter(node_errors), None), kind, "", node_errors)
