"""Images of any size, brought to the multiples a latent needs."""

import pytest
import torch

from davae_core.errors import LatentError
from davae_core.sizes import centre, crop_to_multiple, pad_to, pad_to_multiple, round_up

SIZES = [(5, 7), (8, 7), (5, 8), (1, 1), (9, 16)]


def around(small: int, large: int) -> int:
    """Pixels before a side of ``small`` in the middle of one of ``large``; an odd one left over goes behind."""
    return (large - small) // 2


@pytest.mark.parametrize("mode", ["replicate", "constant"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_padding_continues_the_image_equally_on_both_sides(height: int, width: int, mode: str) -> None:
    image = torch.rand(2, height, width, 3) + 1
    padded = pad_to_multiple(image, 8, mode)
    assert padded.shape[1] % 8 == padded.shape[2] % 8 == 0
    assert padded.shape[1] - height < 8 and padded.shape[2] - width < 8
    for i in range(padded.shape[1]):
        for j in range(padded.shape[2]):
            y, x = i - around(height, padded.shape[1]), j - around(width, padded.shape[2])
            inside = 0 <= y < height and 0 <= x < width
            nearest = image[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
            expected = nearest if inside or mode == "replicate" else torch.zeros(2, 3)
            assert torch.equal(padded[:, i, j], expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_centre_undoes_padding(height: int, width: int) -> None:
    image = torch.rand(2, height, width, 3)
    assert torch.equal(centre(pad_to_multiple(image, 8), height, width), image)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_centre_undoes_padding_to_a_given_size(height: int, width: int) -> None:
    image = torch.rand(2, height, width, 3)
    padded = pad_to(image, 20, 17, "constant")
    assert padded.shape == (2, 20, 17, 3) and torch.isclose(padded.sum(), image.sum())
    assert torch.equal(centre(padded, height, width), image)


def test_an_image_that_fits_is_left_alone() -> None:
    image = torch.rand(1, 16, 8, 3)
    assert pad_to_multiple(image, 8) is image
    assert torch.equal(crop_to_multiple(image, 8), image)


def test_cropping_keeps_the_centre() -> None:
    image = torch.rand(1, 21, 19, 3)
    assert torch.equal(crop_to_multiple(image, 8), image[:, 2:18, 1:17])


@pytest.mark.parametrize(("height", "width"), [(7, 100), (100, 7)])
def test_an_image_too_small_to_crop_is_refused_with_its_size(height: int, width: int) -> None:
    with pytest.raises(LatentError, match=rf"{width} x {height} px.*at least 8 px"):
        crop_to_multiple(torch.rand(1, height, width, 3), 8)


@pytest.mark.parametrize(("side", "expected"), [(1, 32), (32, 32), (33, 64), (1024, 1024), (1000, 1024)])
def test_rounding_goes_up(side: int, expected: int) -> None:
    assert round_up(side, 32) == expected
