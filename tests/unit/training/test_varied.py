"""Variants of pictures: which there are, and that they come back with their seed or their picture."""

import pytest
import torch

from davae_core.training.data.draws import Draws
from davae_core.training.data.varied import MOVE, nth, varied


def many(image: torch.Tensor, step: int = 0, variants: int = 0) -> torch.Tensor:
    return varied(image.expand(900, -1, -1, -1), Draws(0, step, torch.arange(900)), variants)


def kinds(images: torch.Tensor) -> int:
    return len({tuple(one.flatten().tolist()) for one in images})


def test_variants_are_those_of_the_seed() -> None:
    image = torch.arange(3 * 32 * 32.0).view(1, 3, 32, 32)
    made = many(image)
    assert kinds(made) > 800 and torch.equal(made, many(image)) and not torch.equal(made, many(image, 1))


def test_a_picture_is_turned_mirrored_and_changes_its_colours() -> None:
    """A corner of one colour, far enough from the edges to stay whole: where its arms point, and its channel."""
    image = torch.zeros(1, 3, 64, 64)
    image[0, 0, 24:40, 28:31] = image[0, 0, 37:40, 28:38] = 1
    made = many(image)
    colours = made.amax(dim=(2, 3)).argmax(dim=1)
    shapes = set()
    for one in made.amax(dim=1):
        rows, columns = one.amax(dim=1).nonzero(), one.amax(dim=0).nonzero()
        shapes.add(tuple(one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten().tolist()))
    assert set(colours.tolist()) == {0, 1, 2}
    assert len(shapes) == 8
    assert torch.equal(made.sum(dim=(1, 2, 3)), image.sum().expand(900))


def test_a_picture_is_moved_by_at_most_half_a_position() -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32, 32] = 1
    places = many(image).amax(dim=1).flatten(1).argmax(dim=1)
    rows, columns = places // 64, places % 64
    for side in (rows, columns):
        assert 31 - MOVE <= int(side.min()) < 28 and 36 < int(side.max()) <= 32 + MOVE


def test_what_is_moved_in_is_the_picture_mirrored() -> None:
    image = torch.full((1, 3, 16, 16), 0.25)
    assert torch.equal(many(image), image.expand(900, -1, -1, -1))


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (1, 5), (4, 4)])
def test_the_shape_is_kept(shape: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    assert many(image).shape == (900, 3, *shape)
    assert many(image, variants=3).shape == (900, 3, *shape)


def test_a_number_of_variants_is_all_that_a_picture_has() -> None:
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = many(image, variants=3), many(image, 1, variants=3)
    assert kinds(first) == 3 and kinds(torch.cat([first, second])) == 3
    assert any(torch.equal(one, image[0]) for one in first)
    assert kinds(many(image, variants=1)) == 1


def test_another_picture_has_other_variants() -> None:
    """The same turn, move and colours for all pictures would be a bias, not a variety."""
    image = torch.zeros(3, 32, 32)
    image[0, 16, 16] = 1
    places = set()
    for i in range(64):
        other = image.clone()
        other[2, 0, 0] = i / 64
        places.add(nth(other, 1).amax(dim=0)[8:-8, 8:-8].argmax().item())
    assert len(places) > 20
