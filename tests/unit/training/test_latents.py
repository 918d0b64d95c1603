"""Latents of images are computed once."""

import pytest
import torch

from davae_core.training.data.latents import LatentCache


class Encoder:
    """Doubles; knows how many images it was given."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.images += len(x)
        return 2 * x


def test_an_image_is_encoded_once_wherever_it_comes_again() -> None:
    encode = Encoder()
    cache = LatentCache(encode, keep=True)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(cache(x), 2 * x)
    assert torch.equal(cache(x[[2, 0]]), 2 * x[[2, 0]])
    assert encode.images == 4
    mixed = torch.cat([x[:1], torch.randn(1, 3, 2, 2), x[3:]])
    assert torch.equal(cache(mixed), 2 * mixed)
    assert encode.images == 5


def test_a_mirrored_image_is_another_image() -> None:
    encode = Encoder()
    cache = LatentCache(encode, keep=True)
    x = torch.randn(1, 3, 2, 2)
    cache(x)
    assert torch.equal(cache(x.flip(-1)), 2 * x.flip(-1))
    assert encode.images == 2


def test_an_image_twice_in_its_first_batch_is_right_both_times() -> None:
    x = torch.randn(1, 3, 2, 2).repeat(3, 1, 1, 1)
    assert torch.equal(LatentCache(Encoder(), keep=True)(x), 2 * x)


def test_without_keeping_every_image_is_encoded_every_time() -> None:
    encode = Encoder()
    cache = LatentCache(encode, keep=False)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(cache(x), cache(x))
    assert encode.images == 8
    assert cache.known == {}


@pytest.mark.parametrize("others", [1, 3, 7])
def test_a_kept_latent_does_not_depend_on_the_images_it_came_with(others: int) -> None:
    # A resumed run meets its images in other company than the first time, and must see the same latents.
    encode = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.SiLU(), torch.nn.Conv2d(32, 32, 3, stride=2))
    x = torch.randn(8, 3, 16, 16)
    alone, together = LatentCache(encode, keep=True), LatentCache(encode, keep=True)
    together(x[: others + 1])
    assert torch.equal(torch.cat([alone(x[i : i + 1]) for i in range(8)]), together(x))


def test_what_is_kept_is_not_changed_by_those_who_use_it() -> None:
    cache = LatentCache(Encoder(), keep=True)
    x = torch.randn(2, 3, 2, 2)
    cache(x).zero_()
    assert torch.equal(cache(x), 2 * x)


def test_there_is_no_gradient_into_the_encoder() -> None:
    weight = torch.ones(1, requires_grad=True)
    for keep in (True, False):
        assert not LatentCache(lambda x: weight * x, keep)(torch.randn(2, 3, 2, 2)).requires_grad
