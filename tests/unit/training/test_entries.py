"""Settings of a folder: how often it is seen, and what comes before and after its captions."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from davae_core import checkpoints, tiny
from davae_core.errors import DAVAEError
from davae_core.training.data import entries, prompts, stored_latents, survey
from davae_core.training.data.config import DataConfig
from davae_core.training.data.dataset import loader
from davae_core.training.data.entries import Entry
from davae_core.training.data.sources import index
from davae_core.training.data.stored_latents import load_latents
from davae_core.training.text.encode import captions_in

SAID = {
    "photos": Entry("photos"),
    r"D:\my photos, 2024": Entry(r"D:\my photos, 2024"),
    r"D:\cats::repeats=3": Entry(r"D:\cats", 3),
    "cats::prefix=a photo of a cat, on film": Entry("cats", prefix="a photo of a cat, on film"),
    "cats:: repeats = 2 ::suffix=, film=grain": Entry("cats", 2, suffix=", film=grain"),
    "s-{00..12}.tar::repeats=2": Entry("s-{00..12}.tar", 2),
    "cats::size=512::repeats=2": Entry("cats", 2, size=512),
}


@pytest.mark.parametrize("text", SAID)
def test_settings_follow_the_place_after_two_colons(text: str) -> None:
    assert entries.parse(text) == SAID[text]


@pytest.mark.parametrize(
    "setting", ["repeat=3", "3", "repeats=0", "repeats=-1", "repeats=two", "repeats=", "", "size=0", "size=1k"]
)
def test_what_is_no_setting_is_refused_with_what_could_be(setting: str) -> None:
    with pytest.raises(DAVAEError, match=r"--data\.images.*(repeats=3::prefix=a photo of|whole number of at least 1)"):
        entries.parse(f"cats::{setting}")


def test_a_folder_that_is_there_is_a_place_whatever_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a::repeats=2"
    folder.mkdir()
    assert entries.parse(str(folder)) == Entry(str(folder))


CAPTIONS = {
    "a cat": ("photo of", "", "photo of a cat"),
    "a dog": ("sks,", ", film", "sks, a dog, film"),
    "a cow": ("", "on film", "a cow on film"),
    "": ("sks", "", "sks"),
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_words_come_before_and_after_a_caption_or_are_it(caption: str) -> None:
    prefix, suffix, whole = CAPTIONS[caption]
    assert Entry("x", prefix=prefix, suffix=suffix).captions((caption,) if caption else ()) == (whole,)


@pytest.fixture
def images(tmp_path: Path) -> tuple[str, ...]:
    """Four cats, three times each, and six dogs."""
    for kind, count in (("cats", 4), ("dogs", 6)):
        (tmp_path / kind).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (i, count, 0)).save(tmp_path / kind / f"{i}.png")
            (tmp_path / kind / f"{i}.txt").write_text(f"number {i}")
    (tmp_path / "cats" / "3.txt").unlink()
    return f"{tmp_path / 'cats'}::repeats=3::prefix=a cat,", str(tmp_path / "dogs")


def test_an_epoch_goes_through_a_folder_as_often_as_it_says_and_no_batch_twice(images: tuple[str, ...]) -> None:
    batches = list(loader(DataConfig(images, size=16, workers=0), 6, 0, 8, steps=3))
    assert [len(batch["name"]) for batch in batches] == [6, 6, 6]
    assert all(len(set(batch["name"])) == 6 for batch in batches)
    assert Counter(Path(name).parent.name for batch in batches for name in batch["name"]) == {"cats": 12, "dogs": 6}


def test_embeddings_are_made_of_the_captions_that_a_training_sees(images: tuple[str, ...]) -> None:
    seen = {
        caption
        for batch in loader(DataConfig(images, size=16, workers=0), 6, 0, 8, steps=3)
        for caption in batch["caption"]
    }
    assert seen == set(captions_in(images)) - {""}
    assert {"a cat, number 0", "a cat,", "number 5"} <= seen
    assert [source.captioned for source in index(images)] == [True] * 3 + [False] + [True] * 6


# --- several sizes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures of 64 px and one of 24."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / f"{i}.png")
    Image.new("RGB", (24, 24), (9, 0, 0)).save(folder / "small.png")
    return folder


def test_a_folder_that_is_named_twice_is_cut_to_two_sizes(photos: Path) -> None:
    config = DataConfig((str(photos), f"{photos}::size=16"), size=32, workers=0)
    found = survey.collect(config, 8)
    assert found.shapes[0] == (32, 32) and set(found.shapes) == {(32, 32), (16, 16)}
    told = found.table.told()
    assert told["taken"]["cut to 32 px"] == 6 and told["taken"]["cut to 16 px"] == 7
    assert told["noted"] == {}  # in two sizes it is not the same picture twice
    assert told["left_out"][survey.SMALL]["examples"] == [f"{photos / 'small.png'} (24 x 24)"]
    seen: Counter[tuple[int, str]] = Counter()
    for batch in loader(config, 3, 0, 8, steps=5):
        assert batch["image"].shape[2] == batch["image"].shape[3]
        seen.update((batch["image"].shape[3], Path(name).name) for name in batch["name"])
    assert {size for size, _ in seen} == {32, 16} and (16, "small.png") in seen and (32, "small.png") not in seen
    assert {name for size, name in seen if size == 32} == {f"{i}.png" for i in range(6)}


def test_sizes_and_aspect_ratios_go_together(tmp_path: Path) -> None:
    for i, size in enumerate([(128, 128), (160, 80), (80, 160)]):
        Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{i}.png")
    config = DataConfig((f"{tmp_path}::size=32", str(tmp_path)), size=64, buckets=True, workers=0)
    shapes = {tuple(batch["image"].shape[2:]) for batch in loader(config, 2, 0, 8, steps=6)}
    assert len(shapes) == 6 and {(32, 32), (64, 64)} <= shapes
    assert {a * b > 32 * 32 for a, b in shapes} == {True, False}


def test_held_out_pictures_are_held_out_in_every_size(photos: Path) -> None:
    config = DataConfig((str(photos), f"{photos}::size=16"), size=32, held_out=("30%",), workers=0)
    found = survey.collect(config, 8)
    held = {Path(source.name).name for source in found.held}
    assert held and not held & {Path(source.name).name for source in found.sources}


@pytest.mark.parametrize(
    ("size", "said"), [("64", r"asks for a size of 64, --data\.size is 32"), ("20", "size 20 is not a multiple of 8")]
)
def test_a_size_that_cannot_be_is_refused(photos: Path, size: str, said: str) -> None:
    with pytest.raises(DAVAEError, match=said):
        survey.collect(DataConfig((f"{photos}::size={size}",), size=32), 8)


def test_prompts_have_no_size_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(DAVAEError, match=r"prompts\.txt::size=16.*has one size, --data\.size"):
        prompts.collect(DataConfig((f"{tmp_path / 'prompts.txt'}::size=16",), size=32), 8)


def test_an_adapter_learns_two_sizes_from_latents_that_were_computed_before(
    stages: Any, photos: Path, tmp_path: Path
) -> None:
    data = f"--data.images {photos} {photos}::size=32 --data.size 64 --data.no-flip --data.workers 0"
    latents = tmp_path / "latents"
    davae = f"--autoencoder {stages.file('autoencoder')} --out {latents}"
    assert stored_latents.main([*data.split(), *davae.split()]) == 0
    stored = load_latents(latents, stages.file("autoencoder"))
    config = DataConfig((str(photos), f"{photos}::size=32"), size=64, flip=False, workers=0)
    batches = list(loader(config, 3, 0, 32, steps=4, latents=stored))
    assert {tuple(batch["latent"].shape[2:]) for batch in batches} == {(4, 4), (2, 2)}
    assert stages.run("adapter", tmp_path / "run", 4, *data.split(), "--latents", str(latents)) == 0
    assert checkpoints.load_adapter(tmp_path / "run" / tiny.ADAPTER).config.recommended.size == 64
