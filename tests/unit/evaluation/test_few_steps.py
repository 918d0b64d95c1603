"""Few steps: the ways of drawing that are compared, their figures, and what should be reached."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints, images
from davae_core.adapter import Recommended, zero_adapter
from davae_core.errors import DAVAEError
from davae_core.evaluation import few_steps, generate
from davae_core.evaluation.family import Family, FamilyFiles, load_family
from davae_core.evaluation.generate import Prompt
from davae_core.few_steps import FewStepLora
from davae_core.latent import LatentSpec
from harness.untrained import Family as Untrained

CAPTIONS = ("3d peach", "flat peach", "3d rocket", "flat rocket")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(2)
    for i, caption in enumerate(CAPTIONS):
        place = root / ("train" if i < 2 else "held_out") / f"{i}.png"
        x = torch.ones(3, 64, 64)
        x[:, 16:48, 16:48] = torch.rand(3, 32, 32, generator=generator) * 2 - 1
        images.save_image(place, x)
        place.with_suffix(".txt").write_text(caption)
    return root


def random_lora(family: Untrained, latent: LatentSpec | None = None) -> FewStepLora:
    """Of every layer that the paper adapts, with an effect."""
    generator = torch.Generator().manual_seed(7)
    state = zero_adapter(family.model, family.latent, 4, generator=generator).lora_state()
    drawn = {
        name: tensor.normal_(std=0.3, generator=generator) if tensor.ndim else tensor for name, tensor in state.items()
    }
    return FewStepLora(latent or family.latent, Recommended(64, 2.0, 1.0, 2), drawn)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, untrained: Untrained) -> Path:
    path = tmp_path_factory.mktemp("lora") / "few.safetensors"
    checkpoints.save_few_step_lora(path, random_lora(untrained))
    return path


def test_the_command_writes_every_way_and_its_report(
    folder: Path, lora: Path, options: list[str], where: FamilyFiles, tmp_path: Path
) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    words = ["--images", str(folder), "--lora", str(lora), *options, "--json", str(out), "--html", str(page)]
    words += ["--captions", "2", "--unknown", "2", "--diverse", "1", "--steps", "1", "--seeds", "0", "1"]
    few_steps.main(words)
    told = json.loads(out.read_text())
    names = ["2 steps, cfg 2", "1 with the LoRA", "2 with the LoRA", "1 without it", "2 without it"]
    assert list(told["ways"]) == names and told["recommended"]["steps"] == 2
    samplings = [told["ways"][name]["sampling"] for name in names]
    assert [(one["steps"], one["cfg"]) for one in samplings] == [(2, 2.0), (1, 1.0), (2, 1.0), (1, 1.0), (2, 1.0)]
    figures = [told["ways"][name]["figures"] for name in names]
    assert all(set(one) >= {"psnr", "mottle", "top1", "name"} for one in figures)
    assert len({one["psnr"]["mean"] for one in figures}) == 5
    seeds = told["ways"][names[2]]["seeds"]
    assert figures[2]["psnr"]["mean"] == pytest.approx((seeds["0"]["psnr"] + seeds["1"]["psnr"]) / 2)
    assert told["weights"]["few_steps"]
    html = page.read_text()
    assert all(name in html for name in names) and html.count("<img") == 2 * 6
    limits = [bound["at_least"] or bound["at_most"] for bound in told["bounds"]]
    assert limits[:2] == [0.97, 0.88]


def test_the_lora_draws_other_pictures_and_of_strength_0_the_same(
    family: Family, where: FamilyFiles, lora: Path
) -> None:
    prompts = [Prompt(0, "3d peach")]
    fast = load_family(replace(where, few_steps=lora))
    how = generate.adapted_sampling(fast)
    assert (how.steps, how.cfg) == (2, 1.0)
    one, two = (generate.adapted_latents(given, prompts, 0, how) for given in (family, fast))
    assert not torch.allclose(one, two, atol=1e-2)
    state = family.adapted.state_dict()
    added = checkpoints.load_few_step_lora(lora).added(state, 0.0)
    assert all(torch.equal(tensor, added[name]) for name, tensor in state.items())


def test_ratios_are_to_the_guided_way() -> None:
    guided = {"top1": 1.0, "name": 0.9, few_steps.ALEX: 0.05, "mottle": 0.5, few_steps.FRECHET: 10.0, "diversity": 0.2}
    few = {"top1": 0.96, "name": 0.9, few_steps.ALEX: 0.055, "mottle": 0.6, few_steps.FRECHET: 11.0, "diversity": 0.17}
    bounds = few_steps.bounds_of({"30 steps": guided, "4 with the LoRA": few}, 4)
    assert [bound.passed for bound in bounds] == [False, True, True, False, True, True]
    assert [round(bound.value, 3) for bound in bounds] == [0.96, 0.9, 1.1, 1.2, 1.1, 0.85]


def test_diversity_is_the_distance_between_seeds(family: Family, where: FamilyFiles, lora: Path) -> None:
    class Distance:
        name = "distance"

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).square().mean((1, 2, 3))

    way = few_steps.ways_of(family, load_family(replace(where, few_steps=lora)), [1])[1]
    asked = [few_steps.Asked(Prompt(0, "3d peach"), None)]  # type: ignore[arg-type]
    pictures = [generate.adapted_images(way.family, [asked[0].prompt], seed, way.sampling) for seed in range(3)]
    pairs = [((pictures[a] - pictures[b]) ** 2).mean().item() for a, b in ((0, 1), (0, 2), (1, 2))]
    found = few_steps.diversity(way, asked, 3, Distance(), 4)  # type: ignore[arg-type]
    assert found == pytest.approx(sum(pairs) / 3, rel=1e-4) and found > 0


def test_what_is_no_few_step_lora_or_of_another_model_is_refused(
    where: FamilyFiles, untrained: Untrained, tmp_path: Path
) -> None:
    with pytest.raises(DAVAEError, match=r"a\.safetensors is a DA-VAE adapter; choose a few-step LoRA"):
        load_family(replace(where, few_steps=where.adapter))
    other = replace(untrained.latent, detail_channels=32, detail_mean=(), detail_std=())
    checkpoints.save_few_step_lora(tmp_path / "o.safetensors", random_lora(untrained, other))
    with pytest.raises(DAVAEError, match="for a model of width 64 and 48 channels, the adapted one has 64 and 32"):
        load_family(replace(where, few_steps=tmp_path / "o.safetensors"))
