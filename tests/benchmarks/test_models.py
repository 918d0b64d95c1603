"""The two sides of a comparison do the same work on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import core, others
from benchmarks.setup import Setup
from davae_core.adapter import WIDENED

TOY = Setup(scale="toy")


@pytest.fixture(autouse=True)
def without_autograd():
    with torch.no_grad():
        yield


@pytest.mark.skipif(not others.available(), reason="no diffusers in this environment")
def test_diffusers_has_the_weights_of_ours_and_predicts_the_same() -> None:
    ours = core.model_call(core.native(TOY), TOY, False, 128)()
    theirs = others.transformer_call(TOY, 128)()
    assert ours.abs().max() > 1e-3
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_adapted_model_shares_every_weight_that_the_adapter_leaves_alone() -> None:
    setup = replace(TOY, rank=0)
    native, adapted = core.native(setup).state_dict(), core.adapted(setup).state_dict()
    other = {name for name in adapted if adapted[name].data_ptr() != native[name].data_ptr()}
    assert other == set(WIDENED)


def test_a_model_cut_to_fewer_blocks_keeps_its_width_and_its_share_of_dual_ones() -> None:
    config = Setup(blocks=6).mmdit()
    assert (config.hidden, config.depth, config.dual_attention) == (1536, 6, (0, 1, 2))
    assert Setup().mmdit().dual_attention == tuple(range(13))
