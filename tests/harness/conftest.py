"""A random SD3 model small enough to sample in a moment, in the layout that the stock UNETLoader reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.graph import Graph

DEPTH, HIDDEN, CONTEXT, POOLED, GRID = 2, 128, 64, 32, 16
TOY_FILE = "harness_toy_sd3.safetensors"


def _toy_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {"pos_embed": torch.randn(1, GRID * GRID, HIDDEN, generator=generator) * 0.1}

    def linear(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(*shape, generator=generator) * 0.05
        state[f"{name}.bias"] = torch.zeros(shape[0])

    linear("x_embedder.proj", HIDDEN, 16, 2, 2)
    linear("context_embedder", HIDDEN, CONTEXT)
    for name, width in (("y_embedder", POOLED), ("t_embedder", 256)):
        linear(f"{name}.mlp.0", HIDDEN, width)
        linear(f"{name}.mlp.2", HIDDEN, HIDDEN)
    for i in range(DEPTH):
        for stream in ("x_block", "context_block"):
            block, last = f"joint_blocks.{i}.{stream}", stream == "context_block" and i == DEPTH - 1
            linear(f"{block}.attn.qkv", 3 * HIDDEN, HIDDEN)
            linear(f"{block}.adaLN_modulation.1", (2 if last else 6) * HIDDEN, HIDDEN)
            if not last:
                linear(f"{block}.attn.proj", HIDDEN, HIDDEN)
                linear(f"{block}.mlp.fc1", 4 * HIDDEN, HIDDEN)
                linear(f"{block}.mlp.fc2", HIDDEN, 4 * HIDDEN)
    linear("final_layer.linear", 4 * 16, HIDDEN)
    linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN)
    return state


@pytest.fixture(scope="session")
def add_toy_model():
    """Puts the toy model into the models of a base directory."""

    def add(base: Path) -> None:
        save_file(_toy_state(), base / "models" / "diffusion_models" / TOY_FILE)

    return add


@pytest.fixture(scope="session")
def sampling():
    """Builds a graph that samples the toy model; node ids: 4 the sampler, 5 the capture of its latent."""

    def build(steps: int = 4, seed: int = 0) -> Graph:
        g = Graph()
        model = g.node("UNETLoader", unet_name=TOY_FILE, weight_dtype="default")
        conditioning = g.node("HarnessConditioning", context=CONTEXT, pooled=POOLED, seed=0)
        latent = g.node("EmptySD3LatentImage", width=128, height=128, batch_size=1)
        sampled = g.node(
            "KSampler",
            model=model,
            positive=conditioning,
            negative=conditioning,
            latent_image=latent,
            seed=seed,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        g.node("HarnessCapture", value=sampled, key="latent")
        return g

    return build
