"""Prompts as the data of a training: text files, captions of images that are not looked at, and what is held out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from davae_core.errors import DAVAEError
from davae_core.training.data import dataset, prompts
from davae_core.training.data.config import DataConfig


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def config(*images: str, **changes: Any) -> DataConfig:
    return replace(DataConfig(images, size=64, workers=0), **changes)


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "a boat", "", "# a remark", "  two boats  ", "café")
    found = prompts.collect(config(f"{file}::repeats=2::prefix=a photo of"), 32)
    assert [source.caption for source in found.sources] == [
        "a photo of a boat",
        "a photo of two boats",
        "a photo of café",
    ]
    assert [source.repeats for source in found.sources] == [2, 2, 2]
    assert found.sources[1].name.endswith("p.txt:4")
    assert found.shapes == [(64, 64)]


def test_of_images_the_captions_alone_are_read(tmp_path: Path) -> None:
    """They may be of any size, broken, or empty."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    (tmp_path / "one.txt").write_text("a boat")
    found = prompts.collect(config(str(tmp_path)), 32)
    assert [source.caption for source in found.sources] == ["a boat"]
    assert found.table.told()["left_out"]["an image without a caption"]["count"] == 1


def test_batches_hold_prompts_and_the_shape_to_draw(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", *(f"boat {i}" for i in range(5)))
    given = config(file)
    found = prompts.collect(given, 32)
    blank = prompts.Blank((32, 4, 6))
    loaded = list(dataset.loader(given, 5, 0, 32, steps=2, collection=found, latents=blank))
    assert [batch["latent"].shape for batch in loaded] == [(5, 32, 4, 6)] * 2
    assert sorted(loaded[0]["caption"]) == [f"boat {i}" for i in range(5)]


def test_a_share_is_held_out_by_the_words_and_a_prompt_that_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", *(f"boat {i}" for i in range(40)))
    found = prompts.collect(config(file, held_out=("25%",)), 32)
    held = {source.caption for source in found.held}
    assert 4 <= len(held) <= 16 and held.isdisjoint(source.caption for source in found.sources)
    assert len(held) + len(found.sources) == 40
    other = write(tmp_path / "q.txt", "boat 3", "boat 99")
    found = prompts.collect(config(file, held_out=(other,)), 32)
    assert [source.caption for source in found.held] == ["boat 3", "boat 99"]
    assert len(found.sources) == 39


@pytest.mark.parametrize(
    ("lines", "changes", "words"),
    [
        (("a boat",), {"buckets": True}, "prompts have no aspect ratio"),
        (("a boat",), {"size": 48}, "48 is not a multiple of 32"),
        (("", "# nothing"), {}, "holds no prompts; write one a line"),
        (("a boat",), {"held_out": ("p.txt",)}, "there are no prompts to train on"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...], changes: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.txt", *lines)
    with pytest.raises(DAVAEError, match=words):
        prompts.collect(config("p.txt", **changes), 32)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"nowhere\.txt cannot be read"):
        prompts.collect(config(str(tmp_path / "nowhere.txt")), 32)
    (tmp_path / "p.txt").write_bytes(bytes(range(256)))
    with pytest.raises(DAVAEError, match=r"p\.txt cannot be read"):
        prompts.collect(config(str(tmp_path / "p.txt")), 32)


def test_captions_that_cannot_be_read_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
        (tmp_path / f"{name}.txt").write_text(f"boat {name}")
    (tmp_path / "two.txt").write_bytes(bytes(range(1, 32)) * 20)
    with pytest.raises(
        DAVAEError, match=r"1 of 2 images could not be read: .*two\.png: its caption.*--data\.max-broken"
    ):
        prompts.collect(config(str(tmp_path), max_broken=0), 32)
    table = prompts.collect(config(str(tmp_path)), 32).table.told()
    assert (table["found"], table["taken"]["to train on"], table["left_out"]["unreadable"]["count"]) == (2, 1, 1)
    assert "two.png" in table["left_out"]["unreadable"]["examples"][0] and "could not read" in caplog.text
