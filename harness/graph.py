"""Writes prompts in ComfyUI's API format.

g = Graph()
image = g.node("EmptyImage", width=64, height=64, batch_size=1, color=255)
g.node("SaveImage", images=image[0], filename_prefix="blue")
g.prompt  # {"1": {"class_type": "EmptyImage", "inputs": {...}}, "2": ...}
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One node of a `Graph`; `node[i]` is the link to its i-th output."""

    id: str

    def __getitem__(self, output: int) -> list:
        return [self.id, output]

    def __iter__(self):
        raise TypeError(f"node {self.id} cannot be unpacked: how many outputs it has is not known here; use node[i]")


class Graph:
    """Nodes in the order they were added, with ids "1", "2", ..."""

    def __init__(self) -> None:
        self.prompt: dict[str, dict] = {}

    def node(self, class_type: str, /, **inputs: object) -> Node:
        """Adds a node. An input is a widget value, a link (`other[i]`) or another `Node`, meaning its first output."""
        node = Node(str(len(self.prompt) + 1))
        links = {name: value[0] if isinstance(value, Node) else value for name, value in inputs.items()}
        self.prompt[node.id] = {"class_type": class_type, "inputs": links}
        return node
