"""Settings of a folder: how often it is seen, and what comes before and after its captions."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from davae_core.errors import DAVAEError
from davae_core.training.data import entries
from davae_core.training.data.config import DataConfig
from davae_core.training.data.dataset import loader
from davae_core.training.data.entries import Entry
from davae_core.training.data.sources import index
from davae_core.training.text.encode import captions_in

SAID = {
    "photos": Entry("photos"),
    r"D:\my photos, 2024": Entry(r"D:\my photos, 2024"),
    r"D:\cats::repeats=3": Entry(r"D:\cats", 3),
    "cats::prefix=a photo of a cat, on film": Entry("cats", prefix="a photo of a cat, on film"),
    "cats:: repeats = 2 ::suffix=, film=grain": Entry("cats", 2, suffix=", film=grain"),
    "s-{00..12}.tar::repeats=2": Entry("s-{00..12}.tar", 2),
}


@pytest.mark.parametrize("text", SAID)
def test_settings_follow_the_place_after_two_colons(text: str) -> None:
    assert entries.parse(text) == SAID[text]


@pytest.mark.parametrize("setting", ["repeat=3", "3", "repeats=0", "repeats=-1", "repeats=two", "repeats=", ""])
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
