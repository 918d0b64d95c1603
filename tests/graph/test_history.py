"""The log says when files meet others than those they were trained with, and nothing else does."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from davae_core.history import History, identity
from harness.untrained import Family

OURS, OTHER = "history_ours.safetensors", "history_other.safetensors"


@pytest.fixture(scope="module")
def told(base: Path, toys) -> None:
    """Two adapters that tell their history: of the toys, and of a family with other weights."""
    for name, family in ((OURS, toys.family), (OTHER, Family(seed=77))):
        of = {
            "base_model": identity("base_model", family.diffusion_model().state_dict(), f"base of {name}"),
            "davae": identity("davae", family.davae().state_dict(), f"davae of {name}"),
        }
        adapter = replace(toys.family.adapter(), history=History(steps=3, of=of))
        checkpoints.save_adapter(base / "models" / "loras" / name, adapter)


@pytest.fixture
def said(caplog, comfy):
    """What was logged; what was said once may be said again in each test."""
    module = next(module for name, module in sys.modules.items() if name.endswith("comfy_bridge.history"))
    module._said.clear()
    module._sampled.clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "trained on" in record.getMessage()]


def adapted(g, toys, name: str, strength: float):
    return g.node("DAVAE_Adapter", model=toys.model(g), adapter_name=name, strength=strength)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("decoder", ["DAVAE_DetailDecode", "VAEDecode", "VAEDecodeTiled"])
@pytest.mark.parametrize("name", [OURS, OTHER])
def test_an_adapter_among_others_than_its_own_is_told_of_once(run, toys, said, name: str, decoder: str) -> None:
    """With the stock sampler, and each way to decode."""

    strength = round(1 - len(decoder) / 100, 2)  # no run of another test is taken from the cache

    def graph(seed: int):
        def build(g):
            latent = toys.ksampler(g, adapted(g, toys, name, strength), toys.empty(g), seed=seed)
            davae = toys.davae(g)
            if decoder == "DAVAE_DetailDecode":
                image = g.node(decoder, samples=latent, davae=davae[2], detail_strength=1.0)
            else:
                tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
                image = g.node(decoder, samples=latent, vae=davae, **(tiles if decoder != "VAEDecode" else {}))
            return {"image": image}

        return build

    run(graph(1))
    run(graph(2))
    if name == OURS:
        assert said() == []
        return
    model, davae = said()
    assert f"{OTHER} was trained on base of {OTHER}, this is another" in model
    assert f"was trained on davae of {OTHER}, this is another" in davae and toys.family.davae_file in davae


@pytest.mark.usefixtures("told")
def test_the_samplers_own_adapter_is_told_of(run, toys, said) -> None:
    run(lambda g: {"latent": toys.sampler(g, toys.model(g), adapter_name=OTHER)})
    assert len(said()) == 1 and "base of" in said()[0]


@pytest.mark.usefixtures("told")
def test_a_lora_on_the_model_is_not_another_model(base: Path, run, toys, said) -> None:
    """A LoRA that is loaded already, too: it lives in the weights, and what counts is what was loaded."""
    state = {
        f"transformer.transformer_blocks.0.attn.to_{part}.lora_{factor}.weight": torch.randn(shape)
        for part in "qkv"
        for factor, shape in (("A", (4, toys.family.model.hidden)), ("B", (toys.family.model.hidden, 4)))
    }
    save_file(state, base / "models" / "loras" / "history_lora.safetensors")

    def build(g):
        model = toys.model(g)
        model = g.node("LoraLoaderModelOnly", model=model, lora_name="history_lora.safetensors", strength_model=1.0)
        first = toys.ksampler(g, model, g.node("EmptySD3LatentImage", width=128, height=128, batch_size=1))
        adapted = g.node("DAVAE_Adapter", model=model, adapter_name=OURS, strength=1.0)
        return {"first": first, "second": toys.ksampler(g, adapted, toys.empty(g))}

    run(build)
    assert said() == []


def test_files_without_a_history_say_nothing(run, toys, said) -> None:
    run(lambda g: {"latent": toys.sampler(g, toys.adapter(g, toys.model(g)))})
    assert said() == []
