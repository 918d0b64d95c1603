"""Loading: the stock loader's time and memory, what the adapter adds to it, and a graph that is run again.

Each side runs in a process of its own: what a process has loaded once is never loaded the same way again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from harness.graph import Graph, Node
from harness.headless import HeadlessComfy

from . import core, route
from .setup import Setup

MODEL, ADAPTER = "bench_sd35.safetensors", "bench_adapter.safetensors"
Ready = tuple[Callable[[], Any], dict[str, Any]]


def write_files(folder: Path, setup: Setup) -> None:
    """An unadapted model in fp16, as SD3.5-medium is published, and an adapter for it, where a ComfyUI would look."""
    for kind in ("diffusion_models", "loras"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    published = replace(setup, dtype="fp16")
    save_file(core.native_state(published), folder / "diffusion_models" / MODEL)
    checkpoints.save_adapter(folder / "loras" / ADAPTER, core.adapter(published))


def comfy(setup: Setup, files: Path) -> HeadlessComfy:
    """A ComfyUI that finds the files: one folder for each kind of model, named as ComfyUI names it."""
    booted = route.booted(setup.device)
    import folder_paths  # type: ignore[import-not-found,unused-ignore]

    for folder in files.iterdir():
        folder_paths.add_model_folder_path(folder.name, str(folder))
    return booted


def _loader(g: Graph) -> Node:
    return g.node("UNETLoader", unet_name=MODEL, weight_dtype="default")


def capture(runner: HeadlessComfy, g: Graph, value: Node, inputs: dict[str, object] | None = None) -> Any:
    """Run a graph and give back what a node of it puts out."""
    g.node("HarnessCapture", value=value, key="value")
    return runner.run(g.prompt, inputs=inputs).captured["value"]


def _stock(setup: Setup, files: Path) -> Ready:
    """The stock loader."""
    runner = comfy(setup, files)
    kept: list[Any] = []

    def call() -> None:
        g = Graph()
        kept.append(capture(runner, g, _loader(g)))

    return call, {}


def _adapter(setup: Setup, files: Path) -> Ready:
    """The DA-VAE Adapter node on a model that is there already."""
    runner = comfy(setup, files)
    g = Graph()
    model = capture(runner, g, _loader(g))
    notes: dict[str, Any] = {}

    def call() -> None:
        g = Graph()
        given = g.node("HarnessConstant", key="model")
        node = g.node("DAVAE_Adapter", model=given, adapter_name=ADAPTER, strength=1.0)
        adapted = capture(runner, g, node, {"model": model})
        notes.update(adapted=adapted, shared=shared_share(model, adapted))

    return call, notes


def shared_share(model: Any, adapted: Any) -> float:
    """The share of an adapted MODEL's weights, in bytes, that are the very memory of the MODEL it was made from."""
    theirs = {tensor.data_ptr() for tensor in model.model.diffusion_model.state_dict().values()}
    ours = list(adapted.model.diffusion_model.state_dict().values())
    shared = sum(_bytes(tensor) for tensor in ours if tensor.data_ptr() in theirs)
    return shared / sum(map(_bytes, ours))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _run(setup: Setup, files: Path, again: bool) -> Ready:
    """A whole graph up to one sampled step; or its second run, with another seed."""
    runner = comfy(setup, files)
    positive, negative = route.conditioning(setup)

    def run(seed: int) -> None:
        g = Graph()
        adapted = g.node("DAVAE_Adapter", model=_loader(g), adapter_name=ADAPTER, strength=1.0)
        texts = {name: g.node("HarnessConstant", key=name) for name in ("positive", "negative")}
        latent = g.node("DAVAE_EmptyLatent", width=256, height=256, batch_size=1)
        sampled = g.node(
            "KSampler", model=adapted, **texts, latent_image=latent, seed=seed, steps=1, cfg=2.5,
            sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        capture(runner, g, sampled, {"positive": positive, "negative": negative})

    if again:
        run(1)
    return (lambda: run(2)), {}


SIDES: dict[str, Callable[[Setup, Path], Ready]] = {
    "stock load": _stock,
    "adapter application": _adapter,
    "graph, first run": lambda setup, files: _run(setup, files, False),
    "graph, second run": lambda setup, files: _run(setup, files, True),
}
