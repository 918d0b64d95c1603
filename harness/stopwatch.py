"""How long each node of a run took, from the messages that ComfyUI sends to its client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What a node of the tiny workflows does; all others count as OTHER.
KINDS = dict.fromkeys(("DAVAE_TinySD35", "DAVAE_Loader", "DAVAE_Adapter", "ModelSamplingSD3"), "models")
KINDS |= dict.fromkeys(("KSampler", "DAVAE_Sampler"), "sampling")
KINDS |= {"CLIPTextEncode": "text", "DAVAE_DetailEncode": "encoding"}
KINDS |= dict.fromkeys(("VAEDecode", "DAVAE_DetailDecode"), "decoding")
OTHER = "other"


@dataclass(frozen=True)
class Event:
    """A message to the client.

    Attributes:
        seconds: on the clock of ``time.perf_counter``.
        name: of the event, "executing" for example.
        data: what was sent with it.
    """

    seconds: float
    name: str
    data: Any


@contextlib.contextmanager
def recorded(server: Any) -> Iterator[list[Event]]:
    """Keeps what a ComfyUI's server object (``server.PromptServer.instance``) sends, with the time it was sent."""
    events: list[Event] = []
    send = server.send_sync

    def send_sync(event: object, data: Any, sid: str | None = None) -> None:
        if isinstance(event, str):
            events.append(Event(time.perf_counter(), event, data))
        send(event, data, sid)

    server.send_sync = send_sync
    try:
        yield events
    finally:
        server.send_sync = send


def node_seconds(events: list[Event], end: float) -> dict[str, float]:
    """Seconds by node id; a node ends where the next begins, the last one at ``end``. Cached nodes are not in it."""
    starts = [(event.seconds, event.data["node"]) for event in events if event.name == "executing"]
    seconds: dict[str, float] = {}
    for (start, node), (stop, _) in zip(starts, [*starts[1:], (end, None)]):
        if node is not None:
            seconds[node] = seconds.get(node, 0.0) + stop - start
    return seconds


def by_kind(seconds: dict[str, float], prompt: dict[str, dict]) -> dict[str, float]:
    """The same by kind of work, in the order it was done, OTHER last."""
    kinds: dict[str, float] = {}
    for node, duration in seconds.items():
        kind = KINDS.get(prompt[node]["class_type"], OTHER)
        kinds[kind] = kinds.get(kind, 0.0) + duration
    return dict(sorted(kinds.items(), key=lambda item: item[0] == OTHER))


def steps(events: list[Event], node: str) -> tuple[int, float]:
    """How many steps a node reported, and the seconds between two of them (0 where there are not two)."""
    seen: dict[int, float] = {}
    for event in events:
        if event.name == "progress_state" and node in event.data["nodes"]:
            value = int(event.data["nodes"][node]["value"])
            if value:
                seen.setdefault(value, event.seconds)
    if len(seen) < 2:
        return len(seen), 0.0
    first, last = min(seen), max(seen)
    return last, (seen[last] - seen[first]) / (last - first)
