"""Pictures of any folder: captions, held-out ones, squares, small references."""

import json
from pathlib import Path

import pytest
import torch

from davae_core import images
from davae_core.errors import DAVAEError
from davae_core.evaluation.pictures import Picture, Pictures, find_pictures, read_square, references_of, spread


def write(folder: Path, name: str, caption: str | None = None, size: tuple[int, int] = (16, 16)) -> Path:
    images.save_image(folder / name, torch.rand(3, *size) * 2 - 1)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder / name


def test_a_divided_folder_holds_both_kinds_and_any_other_training_pictures(tmp_path: Path) -> None:
    kept = write(tmp_path / "train" / "deep", "a.png", " a fish\n")
    out = write(tmp_path / "held_out", "b.png")
    assert find_pictures(tmp_path) == Pictures([Picture(kept, "a fish")], [Picture(out, "")])
    other = tmp_path / "other"
    third = write(other, "c.png", "a bird")
    assert find_pictures(other) == Pictures([Picture(third, "a bird")], [])
    assert find_pictures(tmp_path / "train", other).held_out == [Picture(third, "a bird")]


def test_captions_come_from_text_or_json(tmp_path: Path) -> None:
    for name, told in (("a", {"caption": "one"}), ("b", {"caption": ["two", "three"]}), ("c", {"size": 3})):
        write(tmp_path, f"{name}.png")
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    assert [picture.caption for picture in find_pictures(tmp_path).training] == ["one", "two", ""]
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(DAVAEError, match=r"caption of .*c\.png cannot be read"):
        find_pictures(tmp_path)


def test_captions_are_spread_and_none_comes_twice() -> None:
    pictures = [Picture(Path(str(i)), caption) for i, caption in enumerate(["a", "", "b", "a", "c", "d"])]
    assert spread(pictures, 10) == [0, 2, 4, 5]
    assert spread(pictures, 2) == [0, 4]
    with pytest.raises(DAVAEError, match="no picture has a caption"):
        spread([Picture(Path(), "")], 3)


def test_pictures_are_cut_to_their_middle_and_resized_only_where_they_must_be(tmp_path: Path) -> None:
    x = torch.zeros(3, 20, 40)
    x[..., 10:30] = 1
    images.save_image(tmp_path / "a.png", x)
    square = read_square(tmp_path / "a.png", 10)
    assert square.shape == (3, 10, 10) and square.min() == 1
    path = write(tmp_path, "b.png")
    assert torch.equal(read_square(path, 16), images.read_image(path))


def test_references_are_small_and_know_which_are_held_out(tmp_path: Path) -> None:
    train = [Picture(write(tmp_path, f"{i}.png", size=(64, 48)), caption) for i, caption in enumerate("abca")]
    out = [Picture(write(tmp_path, "o.png"), "d"), Picture(train[0].path, "a"), Picture(train[0].path, "")]
    references = references_of(Pictures(train, out), side=8)
    assert references.captions == ("a", "b", "c", "d") and references.held_out_indices == [3]
    assert references.images.shape == (4, 3, 8, 8)
    middle = images.read_image(train[0].path)[:, 8:56]
    assert torch.allclose(references.images[0], torch.nn.functional.avg_pool2d(middle, 6), atol=1e-5)
    assert len(references_of(Pictures(train, out), most=1).captions) == 2
