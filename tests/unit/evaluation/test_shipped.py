"""The tiny family that ships draws what it is asked for: a regression test with trained weights, in the small."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from davae_core import images, tiny
from davae_core.checkpoints import load_tiny_decoder
from davae_core.evaluation import decoding, generate
from davae_core.evaluation.family import Family, FamilyFiles, load_family
from davae_core.evaluation.recall import choose, draw, judge
from davae_core.evaluation.reconstruction import available_metrics
from davae_core.evaluation.references import References, load_references, split

CPU = torch.device("cpu")


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


def test_four_steps_of_its_few_step_lora_are_as_near_to_the_pictures_as_thirty(shipped: Family) -> None:
    """As they must be, and nearer to the guided drawing than four steps of the adapted model alone."""
    fast = load_family(FamilyFiles(few_steps=tiny.FOLDERS["loras"] / tiny.FEW_STEPS))
    how = generate.adapted_sampling(fast)
    assert (how.steps, how.cfg) == (4, 1.0)
    references = load_references()
    prompts = choose(references, 5, captions=8, held_out=4)
    guided = generate.adapted_latents(shipped, prompts, 0, generate.adapted_sampling(shipped))
    few = generate.adapted_latents(fast, prompts, 0, how)
    verdicts = judge(fast.davae.decode(few[:8]).clamp(-1, 1), [prompt.caption for prompt in prompts[:8]], references)
    assert sum(verdict.top1 for verdict in verdicts) >= 7, verdicts
    alone = generate.adapted_latents(shipped, prompts, 0, how)
    away = [float((z - guided).square().mean()) for z in (few, alone)]
    assert away[0] < 0.8 * away[1], away


def test_its_tiny_decoder_is_near_its_joint_decoder_and_much_smaller(shipped: Family) -> None:
    """On pictures that it has drawn."""
    decoder = load_tiny_decoder(tiny.FOLDERS["vae_approx"] / tiny.DECODER, torch.float32)
    sheet = images.read_image(Path(tiny.__file__).with_name("samples.jpg"))
    told = decoding.compare(shipped.davae, decoder, images.parts(sheet, 128)[:24].split(8), available_metrics(CPU)[0])
    assert told["tiny_to_joint"]["psnr"] > 24
    if "st-lpips-alex" in told["tiny_to_joint"]:
        assert told["tiny_to_joint"]["st-lpips-alex"] <= decoding.ALEX
    flops = []
    for work in (shipped.davae.decode, decoder.decode):
        with FlopCounterMode(display=False) as counter:
            work(torch.zeros(1, 32, 8, 8))
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.1 * flops[0]
