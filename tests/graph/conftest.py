"""Toy models in the real ComfyUI, and the graphs the tests of this folder are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.graph import Graph, Node
from harness.headless import HeadlessComfy
from harness.untrained import Family


@dataclass
class Toys:
    """Builds graphs over the toy family."""

    family: Family

    def model(self, g: Graph) -> Node:
        """The user's unadapted MODEL, by the stock loader."""
        return g.node("UNETLoader", unet_name=self.family.model_file, weight_dtype="default")

    def davae(self, g: Graph, dtype: str = "fp32") -> Node:
        """VAE, base VAE, DAVAE."""
        return g.node("DAVAE_Loader", davae_name=self.family.davae_file, dtype=dtype)

    def adapter(self, g: Graph, model: Node | list, zero: bool = False, strength: float = 1.0) -> Node:
        """The adapted MODEL."""
        name = self.family.zero_adapter_file if zero else self.family.adapter_file
        return g.node("DAVAE_Adapter", model=model, adapter_name=name, strength=strength)

    def shifted(self, g: Graph, model: Node | list) -> Node:
        """A MODEL with the time shift that the adapter recommends and every adapted MODEL starts from."""
        return g.node("ModelSamplingSD3", model=model, shift=self.family.recommended.shift)

    def conditioning(self, g: Graph) -> dict[str, Node]:
        """Positive and negative, as inputs of a sampler."""
        widths = {"context": self.family.model.context, "pooled": self.family.model.pooled}
        return {
            "positive": g.node("HarnessConditioning", **widths, seed=1),
            "negative": g.node("HarnessConditioning", **widths, seed=2),
        }

    def empty(self, g: Graph, width: int = 128, height: int = 128, batch: int = 1) -> Node:
        """An empty DA-VAE latent."""
        return g.node("DAVAE_EmptyLatent", width=width, height=height, batch_size=batch)

    def ksampler(self, g: Graph, model: Node | list, latent: Node | list, **settings: object) -> Node:
        """The stock KSampler."""
        defaults = {"seed": 5, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        return g.node("KSampler", model=model, **self.conditioning(g), latent_image=latent, **{**defaults, **settings})

    def sampler(self, g: Graph, model: Node | list, **settings: object) -> Node:
        """The Adapted SD3.5 Sampler."""
        defaults = {
            "adapter_name": "(already adapted)", "seed": 5, "steps": 3, "cfg": 2.0, "sampler_name": "euler",
            "scheduler": "simple", "shift": 0.0, "denoise": 1.0, "width": 128, "height": 128,
        }  # fmt: skip
        return g.node("DAVAE_Sampler", model=model, **self.conditioning(g), **{**defaults, **settings})


@pytest.fixture(scope="session")
def toys(base: Path) -> Toys:
    """The toy family, written into the base directory's models folder."""
    family = Family()
    family.write(base / "models")
    return Toys(family)


@pytest.fixture
def run(comfy: HeadlessComfy, toys: Toys):
    """Runs a graph and gives the objects its ``capture`` names.

    ``run(lambda g: {"latent": node}, inputs={...})`` returns ``{"latent": object}``.
    """

    def go(build, *, inputs: dict[str, object] | None = None):
        g = Graph()
        for key, value in build(g).items():
            g.node("HarnessCapture", value=value, key=key)
        return comfy.run(g.prompt, inputs=inputs).captured

    return go


@pytest.fixture
def fails(comfy: HeadlessComfy, toys: Toys):
    """Runs a graph that must fail and gives the message the user reads."""

    def go(build, *, inputs: dict[str, object] | None = None) -> str:
        g = Graph()
        g.node("HarnessCapture", value=build(g), key="value")
        return str(comfy.run(g.prompt, inputs=inputs, expect_error=True).error.exception_message)

    return go


@pytest.fixture
def picture() -> torch.Tensor:
    """A smooth random IMAGE ``[1, 128, 192, 3]``."""
    small = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    large = torch.nn.functional.interpolate(small, size=(128, 192), mode="bicubic").clamp(0, 1)
    return large.movedim(1, -1).contiguous()
