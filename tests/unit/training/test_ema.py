"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from davae_core.training.run.ema import EMA


def weights() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([[3.0]]))}


@torch.no_grad()
def move(parameters: dict[str, nn.Parameter], by: float) -> None:
    for parameter in parameters.values():
        parameter += by


def test_the_average_starts_at_the_weights() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.999)
    move(parameters, 1.0)
    assert ema.average["a"].tolist() == [1.0, 2.0]


def test_the_first_step_counts_for_nine_parts_in_eleven() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.999)
    move(parameters, 11.0)
    ema.update(1)
    assert torch.allclose(ema.average["a"], torch.tensor([10.0, 11.0]))
    assert torch.allclose(ema.average["b"], torch.tensor([[12.0]]))


def test_late_steps_count_as_the_decay_says() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.9)
    move(parameters, 10.0)
    ema.update(10_000)
    assert torch.allclose(ema.average["a"], torch.tensor([2.0, 3.0]))


def test_the_average_of_weights_at_rest_is_the_weights() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.99)
    move(parameters, 1.0)
    for step in range(1, 3000):
        ema.update(step)
    assert torch.allclose(ema.average["a"], parameters["a"], atol=1e-5)


def test_the_average_is_applied_inside_the_block_alone() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.5)
    move(parameters, 1.0)
    ema.update(1)
    now = parameters["a"].detach().clone()
    with ema.applied():
        assert torch.equal(parameters["a"], ema.average["a"])
        assert not torch.equal(parameters["a"], now)
    assert torch.equal(parameters["a"], now)


def test_the_weights_come_back_after_an_exception() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.5)
    move(parameters, 1.0)
    now = parameters["a"].detach().clone()
    with pytest.raises(KeyboardInterrupt), ema.applied():
        raise KeyboardInterrupt
    assert torch.equal(parameters["a"], now)


def test_a_decay_of_zero_keeps_no_average() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.0)
    move(parameters, 1.0)
    ema.update(1)
    assert ema.average == {}
    with ema.applied():
        assert parameters["a"].tolist() == [2.0, 3.0]
    assert parameters["a"].tolist() == [2.0, 3.0]


def test_updates_leave_no_trace_for_autograd() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.5)
    ema.update(1)
    assert not any(tensor.requires_grad for tensor in ema.average.values())
    assert all(parameter.grad is None for parameter in parameters.values())
