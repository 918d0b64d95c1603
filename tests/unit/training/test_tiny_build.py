"""The tiny family's recipes, and what puts a finished family into the pack."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints, images, tiny
from davae_core.checkpoints import files, metadata
from davae_core.errors import DAVAEError
from davae_core.evaluation import recall
from davae_core.evaluation.references import PICTURE, load_references
from davae_core.tiny_decoder import TinyDecoder, TinyDecoderConfig, mismatch
from davae_core.training.data import entries
from davae_core.training.recipes import tiny as recipes
from davae_core.training.run import loop
from davae_core.training.tiny import build, install, samples


def leave_a_tiny_decoder(autoencoder: Path, folder: Path) -> None:
    """What its stage leaves, untrained: for the latents of this DA-VAE, with the DA-VAE's history."""
    latent = checkpoints.load_autoencoder(autoencoder).latent
    history = metadata.history_of(files.read_metadata(autoencoder)[1], autoencoder.name)
    folder.mkdir()
    model = TinyDecoder(TinyDecoderConfig(latent, (8,) * 5))
    checkpoints.save_tiny_decoder(folder / tiny.DECODER, model, history=history)


@pytest.fixture
def finished(stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which `output/tiny/micro` leads to finished toy trainings."""
    monkeypatch.chdir(tmp_path)
    for stage in build.TRAININGS:
        if stage == "tiny_decoder":
            leave_a_tiny_decoder(stages.file("autoencoder"), recipes.folder("micro", stage))
            continue
        link = recipes.folder("micro", stage)
        link.parent.mkdir(parents=True, exist_ok=True)
        own = {"few_steps": "steps"}.get(stage, stage if stage.startswith("base_") else stage.partition("_")[0])
        link.symlink_to(stages.folder(own), target_is_directory=True)
    data = recipes.folder("micro", "data")
    data.mkdir()
    (data / "train").symlink_to(stages.images, target_is_directory=True)
    return tmp_path


@pytest.mark.parametrize("size", recipes.SIZES)
def test_both_models_of_a_family_work_on_the_same_number_of_tokens(size: str) -> None:
    base, adapted = recipes.base_dit_recipe(size), recipes.adapter_recipe(size)
    patch, factor = base.model.patch, recipes.BASE.factor
    assert base.data.size // (factor * patch) == adapted.data.size // (2 * factor * patch)


@pytest.mark.parametrize("size", recipes.SIZES)
def test_every_stage_reads_what_the_one_before_it_leaves(size: str) -> None:
    davae, finish = recipes.autoencoder_recipe(size), recipes.finished_autoencoder_recipe(size)
    sharpen, robust = recipes.sharpened_autoencoder_recipe(size), recipes.robust_autoencoder_recipe(size)
    last = recipes.finished_adapter_recipe(size)
    predictor, end = recipes.predictor_recipe(size), recipes.finished_predictor_recipe(size)
    model, adapter = recipes.base_dit_recipe(size), recipes.adapter_recipe(size)
    left = {recipes.folder(size, stage) / file for stage, (*_, file) in build.TRAININGS.items()}
    left.add(recipes.folder(size, "base_dit") / tiny.MODEL)
    read = {model.autoencoder, davae.base, finish.base, finish.start, sharpen.base, sharpen.start}
    read |= {robust.base, robust.start, adapter.model, adapter.text_encoder, adapter.autoencoder, last.start}
    read |= {predictor.autoencoder, end.autoencoder, end.start}
    decoder = recipes.tiny_decoder_recipe(size)
    redrawn, few = recipes.redrawn_autoencoder_recipe(size), recipes.few_steps_recipe(size)
    read |= {redrawn.start, redrawn.redraw.adapter, few.autoencoder, few.adapter, decoder.autoencoder}
    assert redrawn.start == robust.run.out / tiny.AUTOENCODER
    assert decoder.autoencoder == few.autoencoder == redrawn.run.out / tiny.AUTOENCODER
    assert {(redrawn.redraw.model, redrawn.redraw.text_encoder), (few.model, few.text_encoder)} == {
        (adapter.model, adapter.text_encoder)
    }
    ends = {end.run.out / tiny.PREDICTOR, decoder.run.out / tiny.DECODER, few.run.out / tiny.FEW_STEPS}
    assert read == left - ends
    assert (last.model, last.autoencoder) == (adapter.model, adapter.autoencoder)


def test_no_recipe_reads_a_held_out_image() -> None:
    for of_stage in (
        recipes.BASE_AUTOENCODER,
        recipes.BASE_DIT,
        recipes.AUTOENCODER,
        recipes.ADAPTER,
        recipes.FEW_STEPS,
        recipes.PREDICTOR,
        recipes.TINY_DECODER,
    ):
        for _, recipe in of_stage.values():
            assert {Path(entries.parse(images).place).name for images in recipe.data.images} <= {
                "train",
                "other",
                "more",
            }


def test_what_is_installed_is_fp16_and_loads(finished: Path) -> None:
    paths = install.install(install.InstallConfig("micro", finished / "pack"))
    assert [path.relative_to(finished / "pack").parts[0] for path in paths] == [*tiny.FOLDERS, "loras"]
    for path in paths:
        tensors, info = files.read(path)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert "CC-BY-4.0" in info["modelspec.license"]
    davae = checkpoints.load_autoencoder(paths[2])
    adapter = checkpoints.load_adapter(paths[3])
    assert davae.latent == adapter.config.latent
    assert len(davae.latent.preview) == 51
    assert json.loads(files.read_metadata(paths[0])[1][tiny.PREVIEW]) == list(davae.latent.preview)
    assert adapter.config.recommended == recipes.adapter_recipe("micro").recommended  # not the toy training's
    for path in paths[2:]:
        history = metadata.history_of(files.read_metadata(path)[1], path.name)
        assert history is not None and history.steps == 2 and history.of
        assert str(finished.parent) not in str(history.settings)
    assert checkpoints.load_text_encoder(paths[1]).config.vocabulary
    assert checkpoints.load_few_step_lora(paths[6]).recommended.cfg == 1.0
    assert not mismatch(checkpoints.load_tiny_decoder(paths[5]).latent, adapter.config.latent)


def test_a_family_without_all_stages_is_not_installed(finished: Path) -> None:
    recipes.folder("micro", "adapter_finish").unlink()
    with pytest.raises(DAVAEError, match=r"adapter.*does not exist"):
        install.install(install.InstallConfig("micro", finished / "pack"))
    assert not (finished / "pack").exists()


def test_building_a_finished_family_trains_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    for module in (build.data, build.more):
        monkeypatch.setattr(module, "prepare", lambda config, *_: asked.append(config))
    assert build.build(build.BuildConfig("micro", install=False)) == loop.FINISHED
    assert capsys.readouterr().out.count("finished before") == len(build.TRAININGS) == 13
    assert [(config.out.name, config.size) for config in asked] == 2 * [("data", 128)]


def test_the_model_cards_picture_shows_what_the_shipped_family_draws(tmp_path: Path) -> None:
    out = tmp_path / "samples.jpg"
    assert samples.main(f"--training 2 --held-out 1 --columns 2 --out {out}".split()) == 0
    drawn = images.parts(images.read_image(out), 128)
    references = load_references(PICTURE)
    known = references.training
    captions = [references.captions[i] for i in (known[0], known[len(known) // 2])]
    assert [verdict.top1 for verdict in recall.judge(drawn[:2], captions, references)] == [True, True]
    assert (drawn[3] == 1).all() and (drawn[2] < 0).any()  # an empty place, and a drawing
