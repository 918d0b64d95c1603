"""Random numbers of a step: the same however the batch is divided, unrelated otherwise."""

import torch

from davae_core.training.data.draws import Draws

LIKE = torch.empty(8, 2, 3)


def draws(step: int = 5, seed: int = 0, start: int = 0, stop: int = 8) -> Draws:
    return Draws(seed, step, torch.arange(start, stop))


def test_a_sample_draws_the_same_numbers_in_whatever_part_of_the_batch_it_is() -> None:
    whole, parts = draws(), [draws(stop=3), draws(start=3)]
    normal = [part.normal("a", LIKE[: len(part.positions)]) for part in parts]
    assert torch.equal(whole.normal("a", LIKE), torch.cat(normal))
    for draw in (Draws.uniform, Draws.gaussian):
        assert torch.equal(draw(whole, "a"), torch.cat([draw(part, "a") for part in parts]))


def test_it_does_not_matter_what_was_drawn_before() -> None:
    first, second = draws(), draws()
    second.uniform("b")
    second.normal("c", LIKE)
    assert torch.equal(first.normal("a", LIKE), second.normal("a", LIKE))
    assert torch.equal(first.normal("a", LIKE), first.normal("a", LIKE))


def test_every_name_step_seed_and_place_has_numbers_of_its_own() -> None:
    numbers = [
        value
        for made in (draws(), draws(step=6), draws(seed=1))
        for name in ("noise", "time", "latent", "detail", "prompt")
        for value in made.gaussian(name).tolist()
    ]
    assert len(set(numbers)) == len(numbers) == 3 * 5 * 8


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    draws().normal("a", LIKE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_numbers_have_the_distribution_they_say() -> None:
    many = draws(stop=4000)
    normal, gaussian, uniform = many.normal("a", torch.empty(4000, 1)), many.gaussian("a"), many.uniform("a")
    for values in (normal, gaussian):
        assert abs(values.mean()) < 0.06
        assert abs(values.std() - 1) < 0.06
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02


def test_shapes_and_types_are_those_asked_for() -> None:
    made = draws()
    assert made.normal("a", LIKE.to(torch.float16)).dtype is torch.float32
    assert made.normal("a", LIKE).shape == LIKE.shape
    assert made.uniform("a").shape == made.gaussian("a").shape == (8,)
