"""Variants of pictures: which there are, and that they come back with their seed."""

import torch

from davae_core.training.data.draws import Draws
from davae_core.training.data.varied import varied


def many(image: torch.Tensor, step: int = 0) -> torch.Tensor:
    return varied(image.expand(600, -1, -1, -1), Draws(0, step, torch.arange(600)))


def test_a_square_picture_has_forty_eight_variants_and_they_are_those_of_the_seed() -> None:
    image = torch.arange(3 * 4 * 4.0).view(1, 3, 4, 4)
    made = many(image)
    assert len({tuple(one.flatten().tolist()) for one in made}) == 48
    assert torch.equal(made, many(image)) and not torch.equal(made, many(image, 1))
    assert torch.equal(made.flatten(1).sort(dim=1).values, image.flatten(1).expand(600, -1))


def test_another_shape_is_kept() -> None:
    image = torch.arange(3 * 2 * 4.0).view(1, 3, 2, 4)
    made = many(image)
    assert made.shape == (600, 3, 2, 4)
    assert len({tuple(one.flatten().tolist()) for one in made}) == 24
