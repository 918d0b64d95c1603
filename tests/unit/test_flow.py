"""Rectified flow: formulas against numbers worked out by hand."""

import math

import pytest
import torch

from davae_core.errors import DAVAEError
from davae_core.flow import (
    add_noise,
    detail_weight,
    flow_loss,
    guided,
    min_snr_weight,
    sample_euler,
    shift_time,
    sigmas,
    velocity,
)


def test_noise_is_added_along_the_straight_line() -> None:
    x0, noise = torch.full((3, 2, 1, 1), 4.0), torch.full((3, 2, 1, 1), -8.0)
    x = add_noise(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert x[:, 0, 0, 0].tolist() == [4.0, 1.0, -8.0]
    assert torch.equal(x[:, 0], x[:, 1])


def test_velocity_is_the_slope_of_that_line() -> None:
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.2, 0.6])
    moved = add_noise(x0, noise, t + 0.125) - add_noise(x0, noise, t)
    assert torch.allclose(moved / 0.125, velocity(x0, noise), atol=1e-5)


@pytest.mark.parametrize(
    ("t", "shift", "expected"), [(0.5, 1.0, 0.5), (0.5, 3.0, 0.75), (0.25, 4.0, 4 / 7), (0.5, 0.5, 1 / 3)]
)
def test_shift_by_hand(t: float, shift: float, expected: float) -> None:
    assert shift_time(torch.tensor(t), shift).item() == pytest.approx(expected)


def test_shift_keeps_both_ends_and_is_undone_by_its_inverse() -> None:
    t = torch.linspace(0, 1, 11)
    shifted = shift_time(t, 4.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert torch.allclose(shift_time(shifted, 0.25), t, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_shift_that_is_not_above_zero_is_refused(shift: float) -> None:
    with pytest.raises(DAVAEError, match="shift must be above 0"):
        shift_time(torch.tensor(0.5), shift)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (25, (1 - math.sqrt(0.5)) / 2), (50, 0.5), (100, 1.0), (101, 1.0), (10**6, 1.0)]
)
def test_detail_weight_is_half_a_cosine_then_one(step: int, expected: float) -> None:
    assert detail_weight(step, 100) == pytest.approx(expected, abs=1e-12)


def test_without_a_warm_up_the_detail_counts_in_full_at_once() -> None:
    assert detail_weight(0, 0) == 1.0


def test_loss_by_hand() -> None:
    prediction = torch.zeros(1, 3, 1, 2)
    target = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).view(1, 3, 1, 2)  # one base channel, two of detail
    loss, base, detail = flow_loss(prediction, target, 1, 0.5)
    assert loss.item() == pytest.approx((5 + 0.5 * 86) / (2 + 0.5 * 4))
    assert (base.item(), detail.item()) == (2.5, 21.5)


def test_at_weight_one_the_loss_is_the_plain_mean_square() -> None:
    prediction, target = torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4)
    assert torch.allclose(flow_loss(prediction, target, 16, 1.0)[0], torch.nn.functional.mse_loss(prediction, target))


def test_at_weight_zero_the_loss_is_that_of_the_base_channels() -> None:
    prediction, target = torch.randn(2, 48, 4, 4), torch.randn(2, 48, 4, 4)
    loss, base, _ = flow_loss(prediction, target, 16, 0.0)
    assert torch.allclose(loss, torch.nn.functional.mse_loss(prediction[:, :16], target[:, :16]))
    assert torch.allclose(loss, base)


def test_at_weight_zero_no_gradient_reaches_the_detail_channels() -> None:
    prediction = torch.randn(1, 32, 2, 2, requires_grad=True)
    with torch.enable_grad():
        loss, base, detail = flow_loss(prediction, torch.zeros(1, 32, 2, 2), 16, 0.0)
        loss.backward()
    assert prediction.grad[:, :16].abs().min() > 0
    assert prediction.grad[:, 16:].abs().max() == 0
    assert not base.requires_grad and not detail.requires_grad


def test_loss_of_half_precision_is_summed_in_full_precision() -> None:
    prediction, target = torch.randn(2, 32, 16, 16).half() * 100, torch.randn(2, 32, 16, 16).half() * 100
    loss = flow_loss(prediction, target, 16, 1.0)[0]
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, ((prediction.double() - target.double()) ** 2).mean().float())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_times_fall_from_one_to_zero(shift: float) -> None:
    times = sigmas(4, shift)
    expected = [shift * t / (1 + (shift - 1) * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert times.tolist() == pytest.approx(expected)


def test_no_steps_are_refused() -> None:
    with pytest.raises(DAVAEError, match="steps must be at least 1, got 0"):
        sigmas(0)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_euler_recovers_the_data_from_the_true_velocity(steps: int, shift: float) -> None:
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    seen: list[torch.Tensor] = []
    times: list[float] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert torch.allclose(x, add_noise(x0, noise, t), atol=1e-5)
        times.append(t[0].item())
        return velocity(x0, noise)

    x = sample_euler(model, noise, sigmas(steps, shift), lambda step, guess: seen.append(guess))
    assert torch.allclose(x, x0, atol=1e-5)
    assert times == pytest.approx(sigmas(steps, shift)[:-1].tolist())
    assert len(seen) == steps
    assert all(torch.allclose(guess, x0, atol=1e-5) for guess in seen)


def test_guidance_extrapolates_from_the_negative_prediction() -> None:
    predictor = guided(lambda x, t, positive: torch.full_like(x, 3.0 if positive else 1.0), cfg=2.5)
    assert predictor(torch.zeros(1), torch.zeros(1)).item() == 1.0 + 2.5 * 2.0


def test_guidance_of_one_never_asks_for_the_negative() -> None:
    asked: list[bool] = []

    def model(x: torch.Tensor, t: torch.Tensor, positive: bool) -> torch.Tensor:
        asked.append(positive)
        return x

    guided(model, cfg=1.0)(torch.zeros(1), torch.zeros(1))
    guided(model, cfg=torch.ones(1, 2, 1, 1))(torch.zeros(1, 2, 1, 1), torch.zeros(1))
    assert asked == [True, True]


def test_channels_may_have_guidance_of_their_own() -> None:
    predictor = guided(lambda x, t, positive: torch.full_like(x, 3.0 if positive else 1.0), torch.tensor([2.5, 1.0]))
    assert predictor(torch.zeros(2), torch.zeros(1)).tolist() == [1.0 + 2.5 * 2.0, 3.0]


def test_min_snr_weighs_as_the_release_does() -> None:
    """Its loss: the squared error of x_0 = x_t - t v, times (1 - t) / t, at most 5."""
    x0, noise, prediction = torch.randn(3, 6, 2, 4, 4).double()
    t = torch.tensor([0.02, 0.1, 1 / 6, 0.5, 0.8, 0.98]).double()
    at = t.view(-1, 1, 1, 1)
    estimate = add_noise(x0, noise, t) - at * prediction
    theirs = ((estimate - x0) ** 2).mean(dim=(1, 2, 3)) * ((1 - t) / t).clamp(max=5.0)
    ours = ((prediction - velocity(x0, noise)) ** 2).mean(dim=(1, 2, 3)) * min_snr_weight(t, 5.0)
    assert torch.allclose(ours, theirs, rtol=1e-9)


def test_at_shift_four_the_noisier_half_has_a_third_of_the_weight() -> None:
    """31 % for t >= 0.8; with the SNR squared it would be 9.5 %."""
    t = shift_time(torch.sigmoid(torch.randn(200_000, generator=torch.Generator().manual_seed(0))), 4.0)
    weight = min_snr_weight(t, 5.0)
    assert float(weight[t >= 0.8].sum() / weight.sum()) == pytest.approx(0.31, abs=0.01)
