"""Predict Detail: an ordinary latent becomes a picture of twice the size; every wrong input is said in clear words."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import memory
from davae_core import checkpoints
from davae_core.history import History, identity
from davae_core.predictor import DetailPredictor, PredictorConfig
from harness.untrained import Family

FOLDER = "latent_upscale_models"


def predict(g, toys, samples, name: str | None = None, dtype: str = "fp32"):
    davae = toys.davae(g, dtype)[2]
    return g.node(
        "DAVAE_PredictDetail", samples=samples, davae=davae, predictor_name=name or toys.family.predictor_file
    )


def constant(g):
    return g.node("HarnessConstant", key="latent")


@pytest.fixture
def write(base):
    """``write(name, family, **changes)``: a predictor of a family, with a history."""

    def go(name: str, family: Family, model: DetailPredictor | None = None) -> str:
        of = {"davae": identity("davae", family.davae().state_dict(), f"davae of {name}")}
        path = base / "models" / FOLDER / name
        checkpoints.save_predictor(path, model or family.predictor(), history=History(steps=1, of=of))
        return name

    return go


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 7, 13), (1, 1, 1)])
def test_the_base_stays_and_the_detail_is_what_the_network_says(run, toys, batch, height, width):
    torch.manual_seed(2)
    z, mask = torch.randn(batch, 16, height, width), torch.rand(1, 8 * height, 8 * width)
    latent = {"samples": z, "noise_mask": mask, "batch_index": [3] * batch, "davae_padding": "of another picture"}
    out = run(lambda g: {"latent": predict(g, toys, constant(g))}, inputs={"latent": latent})["latent"]
    samples = out["samples"]
    assert torch.equal(samples[:, :16], z)
    with torch.no_grad():
        assert torch.allclose(samples, toys.family.predictor().complete(z), atol=1e-5)
    assert samples[:, 16:].std() > 0.1
    assert torch.equal(out["noise_mask"], mask) and out["batch_index"] == [3] * batch
    assert out["downscale_ratio_spacial"] == 16 and "davae_padding" not in out


def test_it_decodes_to_twice_the_size_and_at_strength_0_to_the_base_alone(run, toys):
    def build(g):
        davae = toys.davae(g)[2]
        plain = g.node("DAVAE_FromBaseLatent", samples=constant(g), davae=davae)
        predicted = predict(g, toys, constant(g))
        ways = {"plain": (plain, 0.0), "strength 0": (predicted, 0.0), "predicted": (predicted, 1.0)}
        return {
            name: g.node("DAVAE_DetailDecode", samples=samples, davae=davae, detail_strength=strength)
            for name, (samples, strength) in ways.items()
        }

    out = run(build, inputs={"latent": {"samples": torch.randn(1, 16, 8, 12)}})
    assert out["predicted"].shape == (1, 128, 192, 3)
    assert torch.allclose(out["strength 0"], out["plain"], atol=1e-5)
    assert (out["predicted"] - out["plain"]).abs().mean() > 1e-3


def test_the_adapted_model_samples_it_on(run, toys):
    def build(g):
        model = toys.adapter(g, toys.model(g))
        return {"latent": toys.ksampler(g, model, predict(g, toys, constant(g)), denoise=0.5)}

    out = run(build, inputs={"latent": {"samples": torch.randn(1, 16, 8, 8)}})
    assert out["latent"]["samples"].shape == (1, 32, 8, 8)


def test_the_precision_is_the_davaes(run, toys):
    z = torch.randn(1, 16, 8, 8)
    out = run(lambda g: {"latent": predict(g, toys, constant(g), dtype="bf16")}, inputs={"latent": {"samples": z}})
    samples = out["latent"]["samples"]
    with torch.no_grad():
        exact = toys.family.predictor().complete(z)
    assert samples.dtype == torch.float32 and torch.equal(samples[:, :16], z)
    assert 0 < (samples - exact).abs().max() < 0.1 * exact.abs().max()


def test_the_file_is_read_once_for_many_latents_and_anew_when_it_is_replaced(run, toys, base, write, monkeypatch):
    module = next(module for name, module in sys.modules.items() if name.endswith("comfy_bridge.predictor"))
    read, original = [], module.checkpoints.load_predictor
    monkeypatch.setattr(module.checkpoints, "load_predictor", lambda *a: read.append(a) or original(*a))
    name = write("replaced.safetensors", toys.family)

    def result(seed: int) -> torch.Tensor:
        latent = {"samples": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))}
        return run(lambda g: {"latent": predict(g, toys, constant(g), name)}, inputs={"latent": latent})["latent"][
            "samples"
        ]

    first, _ = result(0), result(1)
    assert len(read) == 1
    other = replace(toys.family, seed=5).predictor()
    write(name, toys.family, DetailPredictor(replace(other.config, latent=toys.family.latent)))
    again = result(0)
    assert len(read) == 2 and not torch.equal(first[:, 16:], again[:, 16:])


def test_comfyui_is_asked_for_what_will_be_used(run, toys, monkeypatch):
    management = next(module for name, module in sys.modules.items() if name == "comfy.model_management")
    asked, load = [], management.load_models_gpu
    monkeypatch.setattr(
        management, "load_models_gpu", lambda *a, **b: asked.append(b.get("memory_required")) or load(*a, **b)
    )
    z, model = torch.randn(1, 16, 192, 160), toys.family.predictor().requires_grad_(False)
    run(lambda g: {"latent": predict(g, toys, constant(g))}, inputs={"latent": {"samples": z}})
    model.complete(z)
    used = memory.peak(lambda: model.complete(z), "cpu")
    assert used <= asked[-1] <= 4 * used


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 32, 8, 8), ["32 channels", "expected an ordinary one of 16", "DA-VAE to Base Latent"]),
        ((1, 4, 8, 8), ["[1, 4, 8, 8]", "[batch, 16, height, width]"]),
        ((1, 16, 1, 8, 8), ["[1, 16, 1, 8, 8]", "[batch, 16, height, width]"]),
        ((0, 16, 8, 8), ["[0, 16, 8, 8]", "[batch, 16, height, width]"]),
    ],
)
def test_another_latent_than_an_ordinary_one(fails, toys, shape, words):
    latent = {"samples": torch.zeros(shape)}
    message = fails(lambda g: predict(g, toys, constant(g)), inputs={"latent": latent})
    assert all(word in message for word in words), message


def test_a_file_that_is_no_predictor(fails, toys, base):
    shutil.copy(base / "models" / "loras" / toys.family.adapter_file, base / "models" / FOLDER / "adapter.safetensors")
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    message = fails(lambda g: predict(g, toys, constant(g), "adapter.safetensors"), inputs={"latent": latent})
    assert "adapter.safetensors" in message and "adapter" in message and "predictor" in message


def test_a_file_that_is_not_there(fails, toys):
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    message = fails(lambda g: predict(g, toys, constant(g), "gone.safetensors"), inputs={"latent": latent})
    assert "gone.safetensors" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"detail_channels": 32, "detail_mean": (), "detail_std": ()}, ["16 + 32 channels", "16 + 16 channels"]),
        ({"base_factor": 16}, ["at 1/32", "at 1/16"]),
        ({"base_shift": 0.1159, "base_scale": 0.3611}, ["shift 0.1159, scale 0.3611", "another family"]),
    ],
)
def test_a_predictor_of_another_kind_of_latent(fails, toys, write, change, words):
    config = PredictorConfig(replace(toys.family.latent, **change), width=32, blocks=1)
    name = write("other_kind.safetensors", toys.family, DetailPredictor(config))
    message = fails(
        lambda g: predict(g, toys, constant(g), name), inputs={"latent": {"samples": torch.ones(1, 16, 8, 8)}}
    )
    told = [*words, name, toys.family.davae_file, "choose the predictor that was trained with this DA-VAE"]
    assert all(word in message for word in told), message


@pytest.mark.parametrize("own", [True, False])
def test_another_davaes_predictor_is_told_of(run, toys, write, caplog, own):
    module = next(module for name, module in sys.modules.items() if name.endswith("comfy_bridge.history"))
    module._said.clear()
    caplog.set_level(logging.WARNING)
    name = write(f"told_{own}.safetensors", toys.family if own else Family(seed=77))
    run(
        lambda g: {"latent": predict(g, toys, constant(g), name)},
        inputs={"latent": {"samples": torch.ones(1, 16, 8, 8)}},
    )
    told = [record.getMessage() for record in caplog.records if "trained on" in record.getMessage()]
    assert len(told) == (not own)
    assert own or (name in told[0] and toys.family.davae_file in told[0] and "is not this DA-VAE's" in told[0])
