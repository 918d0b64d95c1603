"""Loading a family, and drawing with it."""

import shutil
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints, records, sampling
from davae_core.adapter import Adapter, Recommended, merge
from davae_core.checkpoints import files
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.embeddings import KIND, key_of
from davae_core.errors import CheckpointError, DAVAEError
from davae_core.evaluation import family as families
from davae_core.evaluation import generate
from davae_core.evaluation.family import Family, FamilyFiles, load_family
from davae_core.evaluation.generate import Prompt
from davae_core.sampling import Sampling
from davae_core.text_encoder import TextEncoder, TextEncoderConfig
from harness.untrained import Family as Untrained

PROMPTS = [Prompt(7, "3d peach"), Prompt(2, "flat rocket"), Prompt(11, "3d rocket")]
QUICK = Sampling(shift=2.0, cfg=2.0, steps=2)


@pytest.fixture
def copies(where: FamilyFiles, tmp_path: Path) -> FamilyFiles:
    """The files once more, to be changed."""
    assert where.text_encoder is not None
    named = {"model": where.model, "autoencoder": where.autoencoder, "adapter": where.adapter}
    named["text_encoder"] = where.text_encoder
    return FamilyFiles(**{role: Path(shutil.copy(path, tmp_path / path.name)) for role, path in named.items()})


# --- loading ----------------------------------------------------------------------------------------------------------


def test_the_detail_has_the_guidance_that_is_asked_for() -> None:
    assert Sampling(cfg=3.0).scales(32, 16) == Sampling(cfg=3.0, detail_cfg=3.0).scales(32, 16) == 3.0
    assert Sampling(cfg=3.0, detail_cfg=1.5).scales(16, 16) == 3.0  # the base model has no detail
    told = Sampling(cfg=3.0, detail_cfg=1.5).scales(32, 16)
    assert isinstance(told, torch.Tensor) and told.flatten().tolist() == [3.0] * 16 + [1.5] * 16


def test_a_command_line_names_any_files_and_the_rest_is_the_tiny_family(where: FamilyFiles, options: list[str]) -> None:
    parser = ArgumentParser()
    families.add_arguments(parser)
    assert families.files_of(parser.parse_args(options)) == where
    assert families.files_of(parser.parse_args([])) == FamilyFiles()
    some = families.files_of(parser.parse_args(["--adapter", "a", "--embeddings", "e"]))
    assert some == FamilyFiles(adapter=Path("a"), text_encoder=None, embeddings=Path("e"))
    with pytest.raises(DAVAEError, match="--text-encoder or --embeddings, not both"):
        families.files_of(parser.parse_args(["--text-encoder", "t", "--embeddings", "e"]))


def test_a_missing_file_is_named(copies: FamilyFiles) -> None:
    for role in ("model", "autoencoder", "adapter", "text_encoder"):
        with pytest.raises(DAVAEError, match=f"gone-{role}"):
            load_family(replace(copies, **{role: Path(f"gone-{role}.safetensors")}))


def test_a_whole_checkpoint_serves_as_the_model(copies: FamilyFiles, family: Family) -> None:
    state, _ = files.read(copies.model)
    vae = {f"first_stage_model.{name}": tensor for name, tensor in files.read(copies.autoencoder)[0].items()}
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()} | vae
    files.save(copies.model, whole, {})
    read = load_family(copies)
    assert all(torch.equal(t, family.adapted.state_dict()[name]) for name, t in read.adapted.state_dict().items())


def test_embeddings_draw_what_the_text_encoder_draws(where: FamilyFiles, family: Family, tmp_path: Path) -> None:
    made: dict[str, records.Record] = {}
    for caption in ["", *(prompt.caption for prompt in PROMPTS)]:
        context, pooled = (tensor[0] for tensor in sampling.encode_captions(family.text, [caption]))  # type: ignore
        made[key_of(caption)] = {"clip": context[:3], "t5": context[3:], "pooled": pooled}
    about = {"context": 32, "pooled": 16}
    records.write(tmp_path, 0, made, KIND, about)
    records.finish(tmp_path, KIND, about)
    read = load_family(replace(where, text_encoder=None, embeddings=tmp_path))
    x = generate.adapted_latents(read, PROMPTS, 0, QUICK)
    assert torch.allclose(x, generate.adapted_latents(family, PROMPTS, 0, QUICK), atol=1e-4)
    with pytest.raises(DAVAEError, match="no embedding of the caption 'a fish'"):
        generate.adapted_latents(read, [Prompt(0, "a fish")], 0, QUICK)


def test_the_adapted_model_is_the_base_model_with_the_adapter_merged(family: Family, untrained: Untrained) -> None:
    base = untrained.diffusion_model().state_dict()
    for model, expected in ((family.base, base), (family.adapted, merge(base, untrained.adapter()))):
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_half_precision_files_are_computed_with_in_full_precision(copies: FamilyFiles, family: Family) -> None:
    for path in (copies.model, copies.autoencoder, copies.adapter, copies.text_encoder):
        assert path is not None
        state, info = files.read(path)
        files.save(path, {key: tensor.half() for key, tensor in state.items()}, info)
    read = load_family(copies)
    assert isinstance(read.text, TextEncoder)
    for model in (read.base, read.adapted, read.text, read.davae):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in model.parameters())
    made = generate.adapted_images(read, PROMPTS, 0, QUICK)
    assert torch.allclose(made, generate.adapted_images(family, PROMPTS, 0, QUICK), atol=0.05)


def test_a_file_of_another_kind_is_named(copies: FamilyFiles) -> None:
    shutil.copy(copies.autoencoder, copies.model)
    with pytest.raises(CheckpointError, match=f"{copies.model.name} is a DA-VAE autoencoder; give an unadapted SD3"):
        load_family(copies)
    shutil.copy(str(copies.text_encoder), copies.adapter)
    with pytest.raises(CheckpointError, match="is the text encoder of the tiny model; choose a DA-VAE adapter"):
        load_family(copies)


def test_a_model_that_lacks_a_tensor_is_named(copies: FamilyFiles) -> None:
    state, info = files.read(copies.model)
    del state["t_embedder.mlp.0.weight"]
    files.save(copies.model, state, info)
    with pytest.raises(CheckpointError, match=rf"{copies.model.name} .*t_embedder\.mlp\.0\.weight"):
        load_family(copies)


def test_files_that_do_not_belong_together_are_refused(copies: FamilyFiles, untrained: Untrained) -> None:
    words = TextEncoderConfig(untrained.words, context=untrained.model.context + 1, pooled=untrained.model.pooled)
    checkpoints.save_text_encoder(str(copies.text_encoder), TextEncoder(words))
    with pytest.raises(DAVAEError, match=r"reads text of width 32 and 16 \(pooled\).* gives 33 and 16"):
        load_family(copies)
    latent = replace(untrained.latent, detail_channels=32, detail_mean=(), detail_std=())
    davae = DAVAE(DAVAEConfig(untrained.base, latent, base_decoder=True))
    checkpoints.save_autoencoder(copies.autoencoder, davae)
    with pytest.raises(DAVAEError, match=r"for latents of 32 channels at 1/16.* makes 48 channels at 1/16"):
        load_family(copies)


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
    copies: FamilyFiles, untrained: Untrained
) -> None:
    adapter = untrained.adapter(zero=True)
    checkpoints.save_adapter(copies.adapter, adapter)
    family = load_family(copies)
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


def test_an_adapter_with_statistics_of_its_own_is_followed(copies: FamilyFiles, untrained: Untrained) -> None:
    adapter = untrained.adapter()
    latent = replace(adapter.config.latent, detail_mean=(5.0,) * 16, detail_std=(1.0,) * 16)
    before = generate.adapted_latents(load_family(copies), PROMPTS, 0, QUICK)
    checkpoints.save_adapter(copies.adapter, Adapter(replace(adapter.config, latent=latent), adapter.state))
    after = generate.adapted_latents(load_family(copies), PROMPTS, 0, QUICK)
    assert torch.allclose(latent.normalise(after), untrained.latent.normalise(before), atol=1e-4)
