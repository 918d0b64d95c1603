"""What a file tells of itself is told on by what is made of it: title, author, licence, history and recommendations."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from davae_core.adapter import Recommended, zero_adapter
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import files, load_merged, metadata, save_adapter, save_autoencoder
from davae_core.checkpoints import merge as merging
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError
from davae_core.history import History
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT

VAE = AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1)
SOURCE = metadata.About("A model", "Ann", "CC-BY-4.0", History(steps=77, recipe="base_dit"))
WORDS = SOURCE.words
ASKED = ("--title", "Mine", "--licence", "MIT")


def told_by(path: Path) -> metadata.About:
    return metadata.about(files.read_metadata(path)[1], path.name)


@pytest.fixture
def model(make_mmdit: Callable[..., MMDiT]) -> MMDiT:
    return make_mmdit(depth=1, grid=4)


@pytest.fixture
def sources(tmp_path: Path, model: MMDiT) -> dict[str, Path]:
    """A base model and a VAE that tell everything."""
    found = {"diffusion_model": model.state_dict(), "vae": Autoencoder(VAE).state_dict()}
    for name, state in found.items():
        files.save(tmp_path / f"source_{name}.safetensors", state, SOURCE.metadata())
    return {name: tmp_path / f"source_{name}.safetensors" for name in found}


@pytest.mark.parametrize("part", ["diffusion_model", "vae"])
def test_a_model_keeps_what_is_told_of_it_to_diffusers_and_back(
    tmp_path: Path, run, sources: dict[str, Path], part: str
) -> None:
    (written,) = run(sources[part], tmp_path / "out.safetensors")
    assert told_by(written) == SOURCE
    run(sources[part], tmp_path / "d", "--to", "diffusers")
    (back,) = run(tmp_path / "d", tmp_path / "back.safetensors")
    assert told_by(back) == SOURCE
    (asked,) = run(sources[part], tmp_path / "asked.safetensors", *ASKED)
    assert told_by(asked) == replace(SOURCE, title="Mine", licence="MIT")


def test_the_models_of_a_checkpoint_are_told_apart_by_their_titles(tmp_path: Path, run, model: MMDiT) -> None:
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in Autoencoder(VAE).state_dict().items()}
    files.save(tmp_path / "sd35.safetensors", state, SOURCE.metadata())
    written = run(tmp_path / "sd35.safetensors", tmp_path / "out")
    assert [told_by(path).title for path in written] == ["A model: diffusion_model", "A model: vae"]
    assert {told_by(path).licence for path in written} == {"CC-BY-4.0"}


def test_a_file_that_tells_nothing_is_called_by_its_part(tmp_path: Path, run) -> None:
    files.save(tmp_path / "v.safetensors", Autoencoder(VAE).state_dict(), {})
    (written,) = run(tmp_path / "v.safetensors", tmp_path / "out.safetensors", "--author", "Ann")
    assert told_by(written) == metadata.About("vae", "Ann")


def test_an_autoencoder_written_for_diffusers_keeps_everything(
    tmp_path: Path, run, make_davae: Callable[..., DAVAE]
) -> None:
    source, settings = tmp_path / "a.safetensors", Recommended(512, 2.0, 3.0, 20)
    save_autoencoder(source, make_davae(base_decoder=True), settings, **WORDS, history=SOURCE.history)
    told = {}
    for name, options in (("plain", ()), ("asked", (*ASKED, "--steps", 8))):
        run(source, tmp_path / name, "--to", "diffusers", *options)
        told[name] = json.loads((tmp_path / name / "davae.json").read_text())
    assert metadata.about_json(told["plain"], "davae.json") == SOURCE
    assert metadata.latent_of(told["plain"], "davae.json")[1] == settings
    assert metadata.about_json(told["asked"], "davae.json").title == "Mine"
    assert metadata.latent_of(told["asked"], "davae.json")[1] == replace(settings, steps=8)


def test_a_merged_model_keeps_what_its_adapter_tells(tmp_path: Path, run, model: MMDiT) -> None:
    settings = Recommended(512, 2.0, 3.0, 20)
    adapter = zero_adapter(model.config, LatentSpec(), rank=2)
    adapter = replace(adapter, config=replace(adapter.config, recommended=settings))
    files.save(tmp_path / "base.safetensors", model.state_dict(), {})
    save_adapter(tmp_path / "a.safetensors", adapter, **WORDS, history=SOURCE.history)
    paths = [str(tmp_path / "base.safetensors"), str(tmp_path / "a.safetensors")]
    merging.main([*paths, str(tmp_path / "m.safetensors")])
    assert told_by(tmp_path / "m.safetensors") == replace(SOURCE, title="DA-VAE merged model")
    merging.main([*paths, str(tmp_path / "n.safetensors"), *ASKED, "--author", "Bob"])
    asked = replace(SOURCE, title="Mine", author="Bob", licence="MIT")
    assert told_by(tmp_path / "n.safetensors") == asked

    run(tmp_path / "n.safetensors", tmp_path / "d", "--to", "diffusers")
    (back,) = run(tmp_path / "d", tmp_path / "back.safetensors")
    (again,) = run(back, tmp_path / "again.safetensors", "--author", "Eve", "--steps", 8)
    assert told_by(back) == asked and load_merged(back).recommended == settings
    assert told_by(again) == replace(asked, author="Eve")
    assert load_merged(again).recommended == replace(settings, steps=8)
    files.save(tmp_path / "damaged.safetensors", model.state_dict(), {metadata.HISTORY: "[]"})
    with pytest.raises(CheckpointError, match="the history in its metadata is damaged"):
        run(tmp_path / "damaged.safetensors", tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [3, None, ["Ann"]])
def test_a_word_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"author is .*, expected a text"):
        metadata.about_json({"author": value}, "davae.json")
