"""Learning rates, which weights decay, and the optimiser's state as tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from davae_core.errors import CheckpointError, DAVAEError
from davae_core.training.run import optimiser as opt
from davae_core.training.run.config import OptimiserConfig

CONSTANT = OptimiserConfig(lr=0.5, warmup=10)
COSINE = replace(CONSTANT, schedule="cosine")


@pytest.mark.parametrize("config", [CONSTANT, COSINE])
def test_the_rate_rises_from_one_part_to_the_whole_over_the_warm_up(config: OptimiserConfig) -> None:
    rates = [opt.learning_rate(config, step, 100) for step in range(10)]
    assert rates == pytest.approx([0.05 * (step + 1) for step in range(10)])


def test_a_constant_rate_stays() -> None:
    assert {opt.learning_rate(CONSTANT, step, 100) for step in (9, 10, 50, 99, 1000)} == {0.5}


def test_a_cosine_starts_at_the_rate_passes_half_in_the_middle_and_ends_at_zero() -> None:
    assert opt.learning_rate(COSINE, 10, 110) == 0.5
    assert opt.learning_rate(COSINE, 60, 110) == pytest.approx(0.25)
    assert opt.learning_rate(COSINE, 109, 110) < 2e-4
    assert opt.learning_rate(COSINE, 110, 110) == 0.0
    rates = [opt.learning_rate(COSINE, step, 110) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)


def test_without_a_warm_up_the_first_step_has_the_whole_rate() -> None:
    for config in (CONSTANT, COSINE):
        assert opt.learning_rate(replace(config, warmup=0), 0, 100) == 0.5


def test_a_warm_up_longer_than_the_run_is_no_error() -> None:
    assert opt.learning_rate(COSINE, 3, 5) == pytest.approx(0.2)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))


def test_kernels_decay_and_biases_and_norms_do_not() -> None:
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = opt.adamw(dict(model.named_parameters()), OptimiserConfig(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if p.ndim == 4 else 1.0)
        assert torch.allclose(p, expected, rtol=1e-6), name


def step(model: nn.Module, optimiser: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(number))
    optimiser.zero_grad()
    model(x).square().mean().backward()
    optimiser.step()


def test_an_optimiser_goes_on_from_its_tensors() -> None:
    model = network()
    names = dict(model.named_parameters())
    optimiser = opt.adamw(names, OptimiserConfig())
    step(model, optimiser, 0)
    tensors = {name: tensor.clone() for name, tensor in opt.state_tensors(optimiser, names).items()}
    assert len(tensors) == 3 * len(names)

    other = network()
    other.load_state_dict(model.state_dict())
    others = dict(other.named_parameters())
    restored = opt.adamw(others, OptimiserConfig())
    opt.load_state(restored, others, tensors)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    for number in (1, 2):
        step(model, optimiser, number)
        step(other, restored, number)
    assert all(torch.equal(names[name], others[name]) for name in names)
    assert all(torch.equal(tensors[name], kept[name]) for name in tensors), "the optimiser works in the tensors it got"


def test_there_is_no_state_before_the_first_step_and_none_is_no_error() -> None:
    names = dict(network().named_parameters())
    optimiser = opt.adamw(names, OptimiserConfig())
    assert opt.state_tensors(optimiser, names) == {}
    opt.load_state(optimiser, names, {})
    assert opt.state_tensors(optimiser, names) == {}


@pytest.mark.parametrize("damage", ["shape", "missing"])
def test_a_state_of_other_parameters_is_refused(damage: str) -> None:
    model = network()
    names = dict(model.named_parameters())
    optimiser = opt.adamw(names, OptimiserConfig())
    step(model, optimiser, 0)
    tensors = opt.state_tensors(optimiser, names)
    if damage == "shape":
        tensors["2.weight/exp_avg"] = torch.zeros(5)
    else:
        del tensors["2.weight/exp_avg"]
    with pytest.raises(CheckpointError, match=r"2\.weight; start a new run"):
        opt.load_state(opt.adamw(names, OptimiserConfig()), names, tensors)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": -1e-4}, r"--optimiser\.lr must be at least 0 and finite, got -0\.0001"),
        ({"lr": NAN}, r"--optimiser\.lr must be at least 0"),
        ({"lr": INF}, r"--optimiser\.lr must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"--optimiser\.betas must be two numbers from 0 to below 1, got \(0\.9, 1\.0\)"),
        ({"betas": (-0.1, 0.9)}, r"--optimiser\.betas"),
        ({"weight_decay": -0.1}, r"--optimiser\.weight-decay must be at least 0"),
        ({"weight_decay": NAN}, r"--optimiser\.weight-decay"),
        ({"clip": -1.0}, r"--optimiser\.clip must be above 0, or 0 for a gradient of any length, got -1\.0"),
        ({"clip": NAN}, r"--optimiser\.clip"),
        ({"warmup": -1}, r"--optimiser\.warmup must be a number of steps, at least 0, got -1"),
        ({"ema": 1.0}, r"--optimiser\.ema must be from 0 \(no average\) to below 1, got 1\.0"),
        ({"ema": -0.5}, r"--optimiser\.ema"),
    ],
)
def test_what_ruins_a_training_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DAVAEError, match=said):
        OptimiserConfig(**wrong)


@pytest.mark.parametrize("fine", [{"betas": (0.0, 0.0)}, {"clip": 0.0}, {"clip": INF}, {"warmup": 0}, {"ema": 0.0}])
def test_the_ends_of_the_bounds_are_taken(fine: dict[str, Any]) -> None:
    OptimiserConfig(**fine)
