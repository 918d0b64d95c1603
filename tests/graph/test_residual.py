"""A DA-VAE with a predictor inside, in the graph: the same pictures from another latent."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from davae_core import checkpoints
from davae_core.history import History, identity

INSIDE = "davae_toy_residual.safetensors"


@pytest.fixture(scope="module")
def inside(base, toys):
    """The toy DA-VAE with the toy predictor inside, among the models."""
    davae = toys.family.davae()
    davae.set_predictor(toys.family.predictor())
    checkpoints.save_autoencoder(base / "models" / "vae" / INSIDE, davae)
    return INSIDE


def loader(g, name, dtype="fp32"):
    return g.node("DAVAE_Loader", davae_name=name, dtype=dtype)


def decoded(g, samples, davae, strength=1.0):
    return g.node("DAVAE_DetailDecode", samples=samples, davae=davae, detail_strength=strength)


@pytest.mark.parametrize(("height", "width"), [(128, 96), (100, 130)])  # the second is padded, and cut off again
def test_pictures_are_those_of_the_davae_without_it(run, toys, inside, height, width):
    def build(g):
        image, nodes = g.node("HarnessConstant", key="image"), {}
        for name in (toys.family.davae_file, inside):
            vae, _, davae = (loader(g, name)[i] for i in range(3))
            latent = g.node("DAVAE_DetailEncode", image=image, davae=davae, size_rule="pad")
            nodes |= {f"{name} latent": latent[0], f"{name} image": decoded(g, latent[0], davae)}
            nodes[f"{name} stock"] = g.node("VAEDecode", samples=g.node("VAEEncode", pixels=image, vae=vae), vae=vae)
        return nodes

    out = run(build, inputs={"image": torch.rand(1, height, width, 3)})
    plain = toys.family.davae_file
    for what in ("image", "stock"):
        assert torch.allclose(out[f"{inside} {what}"], out[f"{plain} {what}"], atol=1e-4)
    one, other = (out[f"{name} latent"]["samples"] for name in (plain, inside))
    assert torch.equal(one[:, :16], other[:, :16]) and not torch.allclose(one[:, 16:], other[:, 16:], atol=0.05)


def test_an_ordinary_latent_has_its_predicted_detail_at_once(run, toys, inside):
    def build(g):
        z, own, other = g.node("HarnessConstant", key="latent"), loader(g, inside)[2], toys.davae(g)[2]
        empty = g.node("DAVAE_FromBaseLatent", samples=z, davae=own)
        predicted = g.node("DAVAE_PredictDetail", samples=z, davae=other, predictor_name=toys.family.predictor_file)
        return {
            "inside": decoded(g, empty, own),
            "strength 0": decoded(g, empty, own, 0.0),
            "predicted": decoded(g, predicted, other),
        }

    out = run(build, inputs={"latent": {"samples": torch.randn(1, 16, 8, 12)}})
    assert torch.allclose(out["inside"], out["predicted"], atol=1e-4)
    assert torch.allclose(out["strength 0"], out["predicted"], atol=1e-4)


def test_predict_detail_says_that_it_is_not_needed(fails, toys, inside):
    message = fails(
        lambda g: g.node(
            "DAVAE_PredictDetail",
            samples=g.node("HarnessConstant", key="latent"),
            davae=loader(g, inside)[2],
            predictor_name=toys.family.predictor_file,
        ),
        inputs={"latent": {"samples": torch.randn(1, 16, 8, 8)}},
    )
    assert INSIDE in message and "has a predictor inside" in message and "Base to DA-VAE Latent" in message


def test_a_latent_of_the_other_davae_is_told_of(run, base, toys, inside, caplog):
    """The encoders of the two are the same; that their latents are not is seen by the predictor."""
    module = next(module for name, module in sys.modules.items() if name.endswith("comfy_bridge.history"))
    module._said.clear()
    caplog.set_level(logging.WARNING)
    of = {"davae": identity("davae", toys.family.davae().state_dict(), toys.family.davae_file)}
    name = "of_the_plain_davae.safetensors"
    checkpoints.save_adapter(base / "models" / "loras" / name, toys.family.adapter(), history=History(steps=1, of=of))

    def told(davae: str) -> list[str]:
        caplog.clear()

        def build(g):
            model = g.node("DAVAE_Adapter", model=toys.model(g), adapter_name=name, strength=1.0)
            return {"image": decoded(g, toys.sampler(g, model)[0], loader(g, davae)[2])}

        run(build)
        return [text for record in caplog.records if "trained on" in (text := record.getMessage())]

    assert not told(toys.family.davae_file)
    (message,) = told(inside)
    assert toys.family.davae_file in message and inside in message
