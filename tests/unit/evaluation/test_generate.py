"""Loading a tiny family, and drawing with it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints, sampling, tiny
from davae_core.adapter import Adapter, Recommended, merge
from davae_core.checkpoints import files
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.errors import CheckpointError, DAVAEError
from davae_core.evaluation import generate
from davae_core.evaluation.family import FILES, Family, find_files, hashes, load_family
from davae_core.evaluation.generate import Prompt
from davae_core.sampling import Sampling
from davae_core.text_encoder import TextEncoder, TextEncoderConfig
from harness.untrained import Family as Untrained

PROMPTS = [Prompt(7, "3d peach"), Prompt(2, "flat rocket"), Prompt(11, "3d rocket")]
QUICK = Sampling(shift=2.0, cfg=2.0, steps=2)


@pytest.fixture
def flat_folder(folder: Path, tmp_path: Path) -> Path:
    """The four files all in one place, and nothing else."""
    for name, path in find_files(folder).items():
        shutil.copy(path, tmp_path / name)
    return tmp_path


# --- loading ----------------------------------------------------------------------------------------------------------


def test_files_are_found_in_sub_folders_and_in_one_place(folder: Path, flat_folder: Path) -> None:
    assert {name: path.parent.name for name, path in find_files(folder).items()} == FILES
    assert {path.parent for path in find_files(flat_folder).values()} == {flat_folder}
    assert hashes(find_files(folder)) == hashes(find_files(flat_folder))


def test_every_missing_file_is_named(flat_folder: Path) -> None:
    (flat_folder / tiny.MODEL).unlink()
    (flat_folder / tiny.ADAPTER).unlink()
    with pytest.raises(DAVAEError, match=rf"{tiny.MODEL}, {tiny.ADAPTER} are not in .*--folder"):
        load_family(flat_folder)
    assert list(find_files(flat_folder, (tiny.AUTOENCODER,))) == [tiny.AUTOENCODER]


def test_the_adapted_model_is_the_base_model_with_the_adapter_merged(family: Family, untrained: Untrained) -> None:
    base = untrained.diffusion_model().state_dict()
    for model, expected in ((family.base, base), (family.adapted, merge(base, untrained.adapter()))):
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_half_precision_files_are_computed_with_in_full_precision(flat_folder: Path, family: Family) -> None:
    for name in FILES:
        state, info = files.read(flat_folder / name)
        files.save(flat_folder / name, {key: tensor.half() for key, tensor in state.items()}, info)
    read = load_family(flat_folder)
    for model in (read.base, read.adapted, read.text, read.davae):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in model.parameters())
    made = generate.adapted_images(read, PROMPTS, 0, QUICK)
    assert torch.allclose(made, generate.adapted_images(family, PROMPTS, 0, QUICK), atol=0.05)


def test_a_file_of_another_kind_is_named(flat_folder: Path) -> None:
    shutil.copy(flat_folder / tiny.AUTOENCODER, flat_folder / tiny.MODEL)
    with pytest.raises(CheckpointError, match=f"{tiny.MODEL}: not an SD3"):
        load_family(flat_folder)
    shutil.copy(flat_folder / tiny.TEXT_ENCODER, flat_folder / tiny.ADAPTER)
    with pytest.raises(CheckpointError, match="is the text encoder of the tiny model; choose a DA-VAE adapter"):
        load_family(flat_folder)


def test_a_model_that_lacks_a_tensor_is_named(flat_folder: Path) -> None:
    state, info = files.read(flat_folder / tiny.MODEL)
    del state["t_embedder.mlp.0.weight"]
    files.save(flat_folder / tiny.MODEL, state, info)
    with pytest.raises(CheckpointError, match=rf"{tiny.MODEL} .*t_embedder\.mlp\.0\.weight"):
        load_family(flat_folder)


def test_files_that_do_not_belong_together_are_refused(flat_folder: Path, untrained: Untrained) -> None:
    words = TextEncoderConfig(untrained.words, context=untrained.model.context + 1, pooled=untrained.model.pooled)
    checkpoints.save_text_encoder(flat_folder / tiny.TEXT_ENCODER, TextEncoder(words))
    with pytest.raises(DAVAEError, match=r"reads text of width 32 and 16 \(pooled\).* gives 33 and 16"):
        load_family(flat_folder)
    latent = replace(untrained.latent, detail_channels=32, detail_mean=(), detail_std=())
    davae = DAVAE(DAVAEConfig(untrained.base, latent, base_decoder=True))
    checkpoints.save_autoencoder(flat_folder / tiny.AUTOENCODER, davae)
    with pytest.raises(DAVAEError, match=r"for latents of 32 channels at 1/16.* makes 48 channels at 1/16"):
        load_family(flat_folder)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_index_and_not_on_the_batch() -> None:
    noise = sampling.initial_noise(0, [5, 6, 7], (4, 2, 2))
    assert torch.equal(sampling.initial_noise(0, [7, 5], (4, 2, 2)), noise[[2, 0]])
    others = torch.cat([noise, sampling.initial_noise(1, [5, 6, 7], (4, 2, 2))]).flatten(1)
    assert torch.cdist(others, others).fill_diagonal_(9).min() > 0.1


def test_a_picture_is_the_same_alone_and_in_a_batch(family: Family) -> None:
    together = generate.adapted_images(family, PROMPTS, 0, QUICK)
    alone = torch.cat([generate.adapted_images(family, [prompt], 0, QUICK) for prompt in PROMPTS])
    assert together.shape == (3, 3, 64, 64)
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_same_seed_draws_the_same_and_another_seed_another_picture(family: Family) -> None:
    for draw, side in ((generate.adapted_images, 64), (generate.base_images, 32)):
        first = draw(family, PROMPTS, 0, QUICK)
        assert first.shape == (3, 3, side, side)
        assert torch.equal(first, draw(family, PROMPTS, 0, QUICK))
        assert (first - draw(family, PROMPTS, 1, QUICK)).abs().max() > 0.01


def test_a_caption_changes_the_picture(family: Family) -> None:
    peach, rocket = (generate.base_latents(family, [Prompt(0, text)], 0, QUICK) for text in ("3d peach", "3d rocket"))
    assert (peach - rocket).abs().max() > 1e-4


def test_with_the_adapter_of_step_zero_the_base_channels_are_the_base_models(
    flat_folder: Path, untrained: Untrained
) -> None:
    adapter = untrained.adapter(zero=True)
    checkpoints.save_adapter(flat_folder / tiny.ADAPTER, adapter)
    family = load_family(flat_folder)
    adapted = generate.adapted_latents(family, PROMPTS, 0, QUICK)
    base = generate.base_latents(family, PROMPTS, 0, QUICK)
    assert torch.allclose(family.latent.split(adapted)[0], base, atol=1e-4)


def test_sampling_is_guided_euler_over_shifted_times(family: Family) -> None:
    noise = sampling.initial_noise(0, [0], (16, 4, 4))
    asked, empty = (sampling.encode_captions(family.text, [text]) for text in ("3d peach", ""))
    x = noise
    for now, after in ((1.0, 0.75), (0.75, 0.0)):  # t = 1/2 shifted by 3 is 3/4
        t = torch.tensor([now])
        positive, negative = (family.base(x, t, *text) for text in (asked, empty))
        x = x + (after - now) * (negative + 2.5 * (positive - negative))
    made = sampling.sample(family.base, family.text, ["3d peach"], noise, Sampling(shift=3.0, cfg=2.5, steps=2))
    assert torch.allclose(made, x, atol=1e-5)


def test_the_adapters_recommendation_is_followed(family: Family) -> None:
    assert generate.adapted_sampling(family) == Sampling(2.0, 2.0, 2)
    assert generate.adapted_sampling(family, steps=9) == Sampling(2.0, 2.0, 9)
    assert generate.image_size(family) == 64


@pytest.mark.parametrize("told", [Recommended(size=64), Recommended(size=64, shift=2.0, cfg=2.0)])
def test_an_adapter_that_recommends_no_sampling_is_refused(family: Family, told: Recommended) -> None:
    with pytest.raises(DAVAEError, match="does not say how to sample"):
        generate.adapted_sampling(replace(family, recommended=told))


@pytest.mark.parametrize("size", [0, 8, 40])
def test_an_adapter_that_recommends_no_size_is_refused(family: Family, size: int) -> None:
    with pytest.raises(DAVAEError, match=f"recommends {size} px; expected a positive multiple of 16"):
        generate.image_size(replace(family, recommended=Recommended(size=size)))


def test_a_davae_without_base_decoder_cannot_draw_the_base_models_pictures(
    family: Family, untrained: Untrained
) -> None:
    davae = DAVAE(DAVAEConfig(untrained.base, untrained.latent)).eval()
    with pytest.raises(DAVAEError, match="holds no base decoder"):
        generate.base_images(replace(family, davae=davae), PROMPTS, 0, QUICK)


def test_batches_leave_nothing_out() -> None:
    assert [len(some) for some in generate.batches(PROMPTS, 2)] == [2, 1]
    assert list(generate.batches([], 2)) == []


def test_an_adapter_with_statistics_of_its_own_is_followed(flat_folder: Path, untrained: Untrained) -> None:
    adapter = untrained.adapter()
    latent = replace(adapter.config.latent, detail_mean=(5.0,) * 16, detail_std=(1.0,) * 16)
    before = generate.adapted_latents(load_family(flat_folder), PROMPTS, 0, QUICK)
    checkpoints.save_adapter(flat_folder / tiny.ADAPTER, Adapter(replace(adapter.config, latent=latent), adapter.state))
    after = generate.adapted_latents(load_family(flat_folder), PROMPTS, 0, QUICK)
    assert torch.allclose(latent.normalise(after), untrained.latent.normalise(before), atol=1e-4)
