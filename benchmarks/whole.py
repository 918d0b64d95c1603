"""A whole checkpoint in SD3.5-medium's layout, about 5 GB: inspected, merged, loaded by ComfyUI, and one step drawn.

The weights are random: what is shown is that it fits and how long it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from davae_core import checkpoints
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import inspect, merge, tensors
from davae_core.mmdit import MMDiT
from harness.graph import Graph, Node

from . import core, loading, memory, route
from .loading import Ready
from .setup import Setup

CHECKPOINT, MERGED = "bench_whole.safetensors", "bench_merged.safetensors"


def write_files(folder: Path, setup: Setup) -> None:
    """The checkpoint in bf16, an adapter, and the two merged, where a ComfyUI would look."""
    published = replace(setup, dtype="bf16")
    for kind in ("checkpoints", "diffusion_models", "loras"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    tensors.write(folder / "checkpoints" / CHECKPOINT, _random(published), {})
    checkpoints.save_adapter(folder / "loras" / loading.ADAPTER, core.adapter(published))
    _merge(folder)


def _random(setup: Setup) -> tensors.Tensors:
    """Diffusion model and VAE, each tensor made when it is written."""
    with torch.device("meta"):
        parts = {"model.diffusion_model": MMDiT(setup.mmdit()), "first_stage_model": Autoencoder(AutoencoderConfig())}
    meta = {
        f"{prefix}.{name}": tensor.to(setup.torch_dtype)
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    return tensors.Tensors(meta, lambda name: torch.empty(meta[name].shape).normal_(std=0.02).to(meta[name].dtype))


def _merge(files: Path) -> None:
    merge.main(
        [
            str(files / "checkpoints" / CHECKPOINT),
            str(files / "loras" / loading.ADAPTER),
            str(files / "diffusion_models" / MERGED),
        ]
    )


def _command(run: Callable[[Path], object]) -> Callable[[Setup, Path], Ready]:
    """A command of ``davae_core.checkpoints``."""

    def make(_: Setup, files: Path) -> Ready:
        notes: dict[str, Any] = {}

        def call() -> None:
            run(files)
            notes["resident_bytes"] = memory.resident()[1]

        return call, notes

    return make


def _graph(load: Callable[[Graph], Node], adapted: bool, size: int = 1024) -> Callable[[Setup, Path], Ready]:
    """A graph that loads a model, and one that draws a step with it; each is timed by itself too."""

    def make(setup: Setup, files: Path) -> Ready:
        comfy = loading.comfy(setup, files)
        positive, negative = route.conditioning(setup)
        notes: dict[str, Any] = {}

        def call() -> None:
            began = time.perf_counter()
            g = Graph()
            model = loading.capture(comfy, g, load(g))
            loaded = time.perf_counter()
            given = {"model": model, "positive": positive, "negative": negative}
            g = Graph()
            links = {name: g.node("HarnessConstant", key=name) for name in given}
            empty = g.node(
                "DAVAE_EmptyLatent" if adapted else "EmptySD3LatentImage", width=size, height=size, batch_size=1
            )
            sampled = g.node(
                "KSampler", **links, latent_image=empty, seed=1, steps=1, cfg=2.5, sampler_name="euler",
                scheduler="simple", denoise=1.0,
            )  # fmt: skip
            latent = loading.capture(comfy, g, sampled, given)["samples"]
            if not latent.isfinite().all():
                raise RuntimeError("the step gave values that are not finite")
            notes.update(load_seconds=loaded - began, step_seconds=time.perf_counter() - loaded)
            notes["resident_bytes"] = memory.resident()[1]

        return call, notes

    return make


def _base(g: Graph) -> Node:
    return g.node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)


SIDES: dict[str, Callable[[Setup, Path], Ready]] = {
    "inspect": _command(lambda files: inspect.main([str(files / "checkpoints" / CHECKPOINT)])),
    "merge": _command(_merge),
    "whole file, base": _graph(_base, False),
    "whole file, base and adapter": _graph(
        lambda g: g.node("DAVAE_Adapter", model=_base(g), adapter_name=loading.ADAPTER, strength=1.0), True
    ),
    "whole file, merged": _graph(lambda g: g.node("DAVAE_ModelLoader", model_name=MERGED, dtype="auto"), True),
}
