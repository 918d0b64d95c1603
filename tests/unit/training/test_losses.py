"""Losses between an image and its reconstruction, and the latent between them."""

import importlib.util

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from davae_core.training import objective
from davae_core.training.objective import Reconstruction, ReconstructionConfig


def test_kl_is_that_of_gaussians_summed_over_the_latent_and_averaged_over_the_batch() -> None:
    moments = torch.randn(3, 8, 2, 2)
    mean, logvar = moments.chunk(2, dim=1)
    known = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(torch.zeros(()), torch.ones(())))
    assert torch.allclose(objective.kl_divergence(moments), known.sum(dim=(1, 2, 3)).mean(), rtol=1e-5)


def test_kl_of_a_standard_normal_is_zero_and_stays_finite_for_any_moments() -> None:
    assert objective.kl_divergence(torch.zeros(2, 4, 1, 1)) == 0
    for extreme in (-1e6, 1e6):
        assert objective.kl_divergence(torch.tensor([0.0, extreme]).view(1, 2, 1, 1)).isfinite()


def test_samples_have_the_moments_they_are_drawn_from() -> None:
    moments = torch.tensor([3.0, -1.0, 0.5, -2.0]).view(1, 4, 1, 1).expand(20_000, 4, 1, 1)
    z = objective.sampled(moments, torch.randn(20_000, 2, 1, 1)).flatten(1)
    assert torch.allclose(z.mean(dim=0), torch.tensor([3.0, -1.0]), atol=0.05)
    assert torch.allclose(z.var(dim=0).log(), torch.tensor([0.5, -2.0]), atol=0.05)
    assert torch.equal(objective.sampled(moments, torch.zeros(1, 2, 1, 1)), moments[:, :2])


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    x, y, moments = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), torch.randn(2, 4, 1, 1)
    parts = Reconstruction(ReconstructionConfig(l1=2.0, perceptual=0.0, kl=0.1))(x, y, moments)
    assert set(parts) == {"loss", "l1", "kl"}
    assert torch.allclose(parts["l1"], (x - y).abs().mean())
    assert torch.allclose(parts["loss"], 2 * parts["l1"] + 0.1 * parts["kl"])


def test_the_squared_difference_is_a_part_where_it_has_a_weight() -> None:
    x, y, moments = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), torch.randn(2, 4, 1, 1)
    parts = Reconstruction(ReconstructionConfig(l1=1.0, l2=3.0, perceptual=0.0, kl=0.0))(x, y, moments)
    assert torch.allclose(parts["l2"], ((x - y) ** 2).mean())
    assert torch.allclose(parts["loss"], parts["l1"] + 3 * parts["l2"])


def test_the_gradient_loss_is_blind_to_a_shift_of_colour_and_counts_every_speck() -> None:
    loss = Reconstruction(ReconstructionConfig(l1=0.0, perceptual=0.0, gradient=2.0))
    x = torch.rand(1, 3, 8, 8)
    assert loss(x, x + 0.3)["loss"].item() == pytest.approx(0.0, abs=1e-6)
    y = x.clone()
    y[0, :, 4, 4] += 0.8
    # One pixel differs from its four neighbours: two pairs of the 8 * 7 along each side.
    assert loss(x, y)["gradient"].item() == pytest.approx(2 * 2 * 0.8 / 56)
    assert loss(x, y)["loss"].item() == pytest.approx(2 * 2 * 2 * 0.8 / 56)


def test_a_new_encoder_that_starts_certain_has_a_spread_of_a_twentieth() -> None:
    layer = torch.nn.Conv2d(4, 6, 1)
    torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 3, 3)
    mean, logvar = layer(x).chunk(2, dim=1)
    objective.start_certain(layer)
    now_mean, now_logvar = layer(x).chunk(2, dim=1)
    assert torch.equal(now_mean, mean)
    assert torch.allclose(now_logvar - logvar, torch.tensor(-6.0))
    assert float(torch.tensor(objective.START_LOGVAR / 2).exp()) == pytest.approx(0.05, rel=0.01)


def test_without_a_perceptual_weight_no_network_is_loaded() -> None:
    assert Reconstruction(ReconstructionConfig(perceptual=0.0, network="lpips-vgg")).distance is None


@pytest.mark.skipif(importlib.util.find_spec("stlpips_pytorch") is None, reason="needs stlpips_pytorch")
def test_the_perceptual_distance_teaches_the_reconstruction_and_does_not_learn() -> None:
    loss = Reconstruction(ReconstructionConfig(l1=0.0, perceptual=2.0, network="st-lpips-alex", kl=0.0))
    assert not any(p.requires_grad for p in loss.parameters())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    parts = loss(x, y, torch.zeros(2, 4, 1, 1))
    assert torch.allclose(parts["loss"], 2 * parts["perceptual"])
    parts["loss"].backward()
    assert y.grad is not None and y.grad.abs().sum() > 0
    assert loss(x, x, torch.zeros(2, 4, 1, 1))["perceptual"] < 1e-6 < parts["perceptual"]
