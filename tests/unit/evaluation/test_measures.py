"""Mottle, white ground, Frechet distance: each is zero where it should be and rises with what it is to find."""

import math

import pytest
import torch

from davae_core.errors import DAVAEError
from davae_core.evaluation.frechet import Features, frechet
from davae_core.evaluation.ground import ground, off_white
from davae_core.evaluation.mottle import flat, mottle


def facets(amplitude: float, side: int = 64) -> torch.Tensor:
    """Grey tiles of 4 px, lighter and darker by chance, ``[1, 3, side, side]``."""
    tiles = torch.randint(0, 2, (1, 1, side // 4, side // 4)).float() * 2 - 1
    return amplitude * tiles.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def on_white(side: int = 32) -> torch.Tensor:
    """A white picture with a black square of 8 px in its middle."""
    x = torch.ones(1, 3, side, side)
    x[..., side // 2 - 4 : side // 2 + 4, side // 2 - 4 : side // 2 + 4] = -1
    return x


# --- mottle -----------------------------------------------------------------------------------------------------------


def test_a_flat_drawing_of_a_flat_picture_has_no_mottle_whatever_its_grey() -> None:
    x = torch.zeros(2, 3, 32, 32)
    assert mottle(x, x).abs().max() < 1e-4
    assert mottle(x + 0.5, x).abs().max() < 1e-4


def test_facets_are_mottle_and_twice_as_strong_ones_twice_as_much() -> None:
    x, tiles = torch.zeros(1, 3, 64, 64), facets(0.02)
    weak, strong = mottle(x + tiles, x).item(), mottle(x + 2 * tiles, x).item()
    assert weak > 0.5 and strong == pytest.approx(2 * weak, rel=1e-4)


def test_mottle_is_in_steps_of_grey() -> None:
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    x = torch.zeros(1, 3, 64, 64)
    # Of a board of +-1, a 5x5 mean takes 1/25.
    assert mottle(x + board / 127.5, x).item() == pytest.approx(24 / 25, rel=0.02)


def test_what_the_true_picture_has_itself_is_no_mottle() -> None:
    x = torch.zeros(1, 3, 64, 64)
    x[..., 32:] = torch.rand(64, 32)
    assert not flat(x)[..., 36:].any() and flat(x)[..., :26].all()
    worse = x.clone()
    worse[..., 36:] += facets(0.2)[..., 36:]
    assert mottle(worse, x).item() == pytest.approx(mottle(x, x).item(), abs=1e-4)
    noise = torch.rand(1, 3, 64, 64)
    assert math.isnan(mottle(noise, noise).item())


def test_a_slope_is_flat_and_an_edge_is_not() -> None:
    slope = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert flat(slope)[..., 4:-4].all()
    edge = torch.where(torch.arange(64) < 32, -1.0, 1.0).expand(1, 3, 64, 64)
    assert not flat(edge)[..., 30:34].any() and flat(edge)[..., :24].all()


# --- white ground -----------------------------------------------------------------------------------------------------


def test_the_ground_keeps_clear_of_what_is_drawn_on_it() -> None:
    where = ground(on_white())
    assert where.sum() == 32 * 32 - (8 + 2 * 3) ** 2
    assert not ground(on_white() - 0.1).any()


@pytest.mark.parametrize(("steps", "counted"), [(7.9, False), (8.1, True)])
def test_a_speckle_counts_from_eight_steps_of_grey_on_in_any_channel(steps: float, counted: bool) -> None:
    x, y = on_white(), on_white()
    y[:, 2, 0, :5] -= steps / 127.5
    y[:, :, 16, 16] = 1  # where the picture is not white, nothing counts
    expected = 5 / (32 * 32 - 14**2) if counted else 0
    assert off_white(y, x).item() == pytest.approx(expected)


def test_a_picture_without_white_has_no_share() -> None:
    assert math.isnan(off_white(torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)).item())


# --- Frechet distance -------------------------------------------------------------------------------------------------


def test_a_set_is_at_distance_zero_from_itself_in_any_order() -> None:
    a = torch.randn(40, 6)
    assert frechet(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_a_moved_or_stretched_set_is_the_closed_form() -> None:
    a = torch.randn(40, 6, dtype=torch.float64)
    assert frechet(a, a + 3) == pytest.approx(6 * 9)
    assert frechet(a, 2 * a) == pytest.approx((a.mean(0).square().sum() + a.var(0).sum()).item())


def test_fewer_pictures_than_features_are_enough_and_one_is_not() -> None:
    a, b = torch.randn(5, 64), torch.randn(7, 64)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6) and 0 < frechet(a, b) == pytest.approx(frechet(b, a))
    with pytest.raises(DAVAEError, match=r"two pictures of each kind, got \[1, 64\]"):
        frechet(a[:1], b)


def test_noisy_pictures_are_further_from_a_set_the_noisier_they_are() -> None:
    features = Features()
    x = torch.cat([facets(0.8, 32) for _ in range(6)])
    found = [features(x + amplitude * torch.randn(x.shape)) for amplitude in (0.0, 0.1, 0.5)]
    assert found[0].shape == (6, 512) and found[0].dtype == torch.float64
    assert torch.allclose(features(x[2:3]), found[0][2:3], rtol=1e-3, atol=1e-2)
    distances = [frechet(found[0], some) for some in found]
    assert distances[0] < 1e-6 * distances[2] and distances[0] < distances[1] < distances[2]
