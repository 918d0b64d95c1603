"""Plain numbers on images: against closed forms, and against Pillow."""

import math

import numpy as np
import pytest
import torch

from davae_core.errors import LatentError
from davae_core.metrics import pooled_distance, psnr, resize_bicubic


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 8, 8)
    b = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.02)])
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0]), rtol=1e-5, atol=0)


def test_psnr_of_black_and_white_is_zero_and_of_equal_images_infinite() -> None:
    white = torch.ones(1, 3, 4, 4)
    assert psnr(white, -white).item() == 0
    assert psnr(white, white).item() == math.inf


def test_psnr_does_not_round_in_half_precision() -> None:
    a = torch.rand(1, 3, 64, 64).bfloat16()
    b = (a + 0.1).bfloat16()
    assert psnr(a, b).item() == psnr(a.float(), b.float()).item()


def test_psnr_refuses_to_broadcast() -> None:
    with pytest.raises(LatentError, match=r"\[1, 3, 8, 8\] and \[1, 3, 4, 8\]"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 8))


@pytest.mark.parametrize(("scale", "size"), [(0.5, (12, 17)), (2, (48, 68)), (1 / 3, (8, 11)), (0.3, (7, 10))])
def test_resizing_agrees_with_pillow(scale: float, size: tuple[int, int]) -> None:
    image = pytest.importorskip("PIL.Image")
    x = torch.rand(1, 1, 24, 34) * 2 - 1
    expected = np.asarray(image.fromarray(x[0, 0].numpy()).resize(size[::-1], image.Resampling.BICUBIC))
    resized = resize_bicubic(x, scale)[0, 0]
    torch.testing.assert_close(resized, torch.tensor(expected).clamp(-1, 1), rtol=0, atol=1e-5)


def test_resizing_stays_in_range_and_keeps_the_type() -> None:
    edge = torch.ones(1, 3, 16, 16, dtype=torch.bfloat16)
    edge[..., 8:] = -1
    resized = resize_bicubic(edge, 2)
    assert resized.dtype == torch.bfloat16
    assert resized.abs().max() == 1


def test_an_image_is_at_distance_zero_from_itself_and_from_its_mirror_image() -> None:
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    references = torch.nn.functional.avg_pool2d(torch.cat([x, x.flip(-1)]), 8)
    distance = pooled_distance(x, references)
    assert distance.shape == (2, 4)
    assert (distance[[0, 0, 1, 1], [0, 2, 1, 3]] < 1e-12).all()
    assert (distance[[0, 0, 1, 1], [1, 3, 0, 2]] > 1e-3).all()


def test_an_image_upside_down_is_another_image() -> None:
    x = torch.linspace(-1, 1, 32)[:, None].expand(1, 3, 32, 32)
    assert pooled_distance(x, torch.nn.functional.avg_pool2d(x.flip(-2), 8)).item() > 0.1


def test_the_distance_is_the_mean_squared_difference_of_the_nearer_flip() -> None:
    small, references = torch.rand(3, 3, 4, 6) * 2 - 1, torch.rand(5, 3, 4, 6) * 2 - 1
    distance = pooled_distance(small.repeat_interleave(8, 2).repeat_interleave(8, 3), references)
    for i, image in enumerate(small):
        for j, reference in enumerate(references):
            expected = min((flip - reference).square().mean().item() for flip in (image, image.flip(-1)))
            assert distance[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_many_references_in_half_precision_give_the_same_as_one_at_a_time() -> None:
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    references = (torch.rand(9001, 3, 2, 2) * 2 - 1).half()
    distance = pooled_distance(x, references)
    assert distance.shape == (2, 9001)
    for j in (0, 4095, 4096, 9000):
        torch.testing.assert_close(distance[:, j : j + 1], pooled_distance(x, references[j : j + 1]))


def test_no_references_give_no_distances() -> None:
    assert pooled_distance(torch.zeros(2, 3, 8, 8), torch.zeros(0, 3, 4, 4)).shape == (2, 0)


@pytest.mark.parametrize("shape", [(5, 1, 4, 4), (5, 3, 16, 4)])
def test_references_that_cannot_be_compared_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(LatentError, match=r"\[2, 3, 8, 8\] cannot be pooled to references \[5,"):
        pooled_distance(torch.zeros(2, 3, 8, 8), torch.zeros(shape))
