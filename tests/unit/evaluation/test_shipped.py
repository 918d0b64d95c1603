"""The tiny family that ships draws what it is asked for: a regression test with trained weights, in the small."""

import pytest

from davae_core.evaluation import generate
from davae_core.evaluation.family import Family, load_family
from davae_core.evaluation.recall import choose, draw, judge
from davae_core.evaluation.references import References, split


@pytest.fixture(scope="module")
def shipped() -> Family:
    return load_family()


def test_it_draws_eight_captions_it_was_trained_on(shipped: Family, references: References) -> None:
    prompts = choose(references, 5, captions=8, held_out=0)
    pictures = draw(shipped, "adapted", prompts, 0, generate.adapted_sampling(shipped), 8)
    verdicts = judge(pictures, [prompt.caption for prompt in prompts], references)
    assert sum(verdict.top1 for verdict in verdicts) >= 7, verdicts


def test_it_composes_four_captions_it_was_not_trained_on(shipped: Family, references: References) -> None:
    prompts = choose(references, 5, captions=0, held_out=4)
    assert {split(prompt.caption)[0] for prompt in prompts} == {"3d", "flat", "noto", "twitter"}
    pictures = draw(shipped, "adapted", prompts, 0, generate.adapted_sampling(shipped), 4)
    verdicts = judge(pictures, [prompt.caption for prompt in prompts], references)
    assert sum(verdict.name for verdict in verdicts) >= 3, verdicts
