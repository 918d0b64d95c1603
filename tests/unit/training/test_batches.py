import random
from collections import Counter

import pytest
import torch

from davae_core.errors import DAVAEError
from davae_core.training.data.batches import BatchPlan, parts, sample_seed


def plans(count: int) -> list[BatchPlan]:
    """Plans over random collections, from one image to some hundred, from one bucket to seven."""
    dice = random.Random(0)
    made = []
    for seed in range(count):
        buckets = dice.randint(1, 7)
        bucket_of = [dice.randrange(buckets) for _ in range(dice.choice([1, 2, 10, 63, 64, 65, 300]))]
        repeats = [dice.choice([1, 1, 2, 9]) for _ in bucket_of] if seed % 2 else None
        made.append(BatchPlan(bucket_of, dice.choice([1, 2, 7, 64]), seed, repeats))
    return made


def bucket_of(plan: BatchPlan, index: int) -> int:
    return next(bucket for bucket, indices in plan.members.items() if index in indices)


def epoch(plan: BatchPlan, number: int) -> list[list[int]]:
    first = number * plan.steps_per_epoch
    return [[draw.index for draw in plan.batch(first + i)] for i in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("plan", plans(20))
def test_every_image_is_seen_as_often_as_it_has_repeats_or_once_more_where_that_fills_batches(plan: BatchPlan) -> None:
    for number in (0, 3):
        seen = Counter(index for batch in epoch(plan, number) for index in batch)
        for indices in plan.members.values():
            more = [seen.pop(int(index)) - int(plan.repeats[index]) for index in indices]
            assert set(more) <= ({0, 1} if len(indices) >= plan.batch_size else {0})
        assert not seen


@pytest.mark.parametrize("plan", plans(20))
def test_a_batch_is_from_one_bucket_and_holds_no_image_twice(plan: BatchPlan) -> None:
    for batch in epoch(plan, 1):
        assert 1 <= len(batch) == len(set(batch)) <= plan.batch_size
        assert len({bucket_of(plan, index) for index in batch}) == 1


@pytest.mark.parametrize("images", [64, 65, 129, 300])
def test_batches_are_full_where_a_bucket_has_enough_images(images: int) -> None:
    assert {len(batch) for batch in epoch(BatchPlan([0] * images, 64, 0), 2)} == {64}


def test_a_bucket_of_fewer_images_than_a_batch_gives_all_of_them_once() -> None:
    # 70 squares and 3 wide images: the wide ones are one short batch, not three images ninety-six times.
    batches = epoch(BatchPlan([0] * 70 + [1] * 3, 64, 0), 0)
    assert sorted(len(batch) for batch in batches) == [3, 64, 64]
    assert {70, 71, 72} in [set(batch) for batch in batches]


def test_repeats_weigh_images_and_never_come_together() -> None:
    plan = BatchPlan([0] * 100, 16, 0, [9] * 20 + [1] * 80)
    seen = Counter(index for number in range(4) for batch in epoch(plan, number) for index in batch)
    assert sum(seen[i] for i in range(20)) == pytest.approx(4 * 180, abs=4 * 16)
    assert all(len(batch) == len(set(batch)) for batch in epoch(plan, 1))


def test_three_images_repeated_often_are_as_many_batches() -> None:
    batches = epoch(BatchPlan([0] * 3, 16, 0, [5, 5, 2]), 0)
    assert sorted(len(batch) for batch in batches) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [1, 3, 6, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [None, 1, 2, 5])
def test_any_batch_is_divided_among_processes_and_each_image_counts_the_same(
    size: int, world: int, micro: int | None
) -> None:
    batch = BatchPlan([0] * size, 64, 0).batch(0)
    shares = [parts(batch, rank, world, micro) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # or gradients would wait for a part that never comes
    counted = {draw.position: 0.0 for draw in batch}
    for share in shares:
        for number, part in enumerate(share):
            assert (part.micro, part.micros) == (number, len(share))
            assert 1 <= len(part.draws) <= (micro or size)
            for draw in part.draws:  # a mean over the part times its share, and then a mean over processes
                counted[draw.position] += part.share / len(part.draws) / world
    assert list(counted.values()) == pytest.approx([1 / size] * size)


@pytest.mark.parametrize("plan", plans(6))
def test_a_step_is_the_same_in_whatever_order_it_is_asked_for(plan: BatchPlan) -> None:
    steps = list(range(3 * plan.steps_per_epoch + 1))
    forward = {step: plan.batch(step) for step in steps}
    random.Random(1).shuffle(steps)
    assert {step: plan.batch(step) for step in steps} == forward


def test_draws_say_where_they_belong() -> None:
    plan = BatchPlan([0] * 10, 4, seed=5)
    draws = plan.batch(7)
    assert [draw.position for draw in draws] == [0, 1, 2, 3]
    assert {(draw.step, draw.epoch) for draw in draws} == {(7, 2)}


def test_no_two_draws_have_the_same_seed() -> None:
    plans = [BatchPlan([0] * 8, 8, seed) for seed in (0, 1)]
    seeds = [draw.seed for plan in plans for step in range(500) for draw in plan.batch(step)]
    assert len(set(seeds)) == len(seeds) == 8000


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, other = (BatchPlan([0] * 64, 8, seed) for seed in (0, 1))
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(other, 0)


def test_buckets_are_mixed_within_an_epoch() -> None:
    plan = BatchPlan([i // 64 for i in range(256)], 4, seed=0)
    order = [bucket_of(plan, batch[0]) for batch in epoch(plan, 0)]
    changes = sum(a != b for a, b in zip(order, order[1:]))
    assert Counter(order) == dict.fromkeys(range(4), 16)
    assert changes > 30


def test_the_plan_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    BatchPlan([0] * 10, 4, seed=5).batch(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("images", "batch"), [(0, 4), (4, 0)])
def test_an_empty_plan_is_refused(images: int, batch: int) -> None:
    with pytest.raises(DAVAEError, match="at least one image"):
        BatchPlan([0] * images, batch, seed=0)


def test_seeds_are_what_they_were() -> None:
    # Written down, because a change would make every interrupted training go on with other images.
    assert sample_seed(0) == 8147104208329303767
    assert sample_seed(1, 2, 3) == 3170426205218118603
    assert [draw.index for draw in BatchPlan([0] * 6, 6, seed=0).batch(0)] == [5, 0, 1, 2, 4, 3]


def test_seeds_depend_on_every_number_and_on_their_order() -> None:
    seeds = {sample_seed(*numbers) for numbers in [(0,), (0, 0), (0, 0, 0), (0, 1), (1, 0), (1,), (0, -1), (0, 2**63)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bits_of_seeds_are_fair() -> None:
    seeds = [sample_seed(0, step, position) for step in range(64) for position in range(64)]
    for bit in range(63):
        share = sum(seed >> bit & 1 for seed in seeds) / len(seeds)
        assert abs(share - 0.5) < 0.04, f"bit {bit}"
