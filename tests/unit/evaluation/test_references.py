"""The reference pictures: what ships, what is made from data, and what is said when they are damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from davae_core import images
from davae_core.errors import DAVAEError
from davae_core.evaluation.references import (
    DESCRIPTION,
    PICTURE,
    References,
    load_references,
    save_references,
    split,
)
from davae_core.training.tiny.captions import Captions, load_captions


def test_the_shipped_references_are_the_captions_that_are_trained_on_and_held_out(references: References) -> None:
    captions = load_captions()
    assert [references.captions[i] for i in references.training] == captions.training
    assert [references.captions[i] for i in references.held_out_indices] == captions.held_out_captions
    assert references.styles == captions.styles
    assert references.images.shape == (1200, 3, 32, 32)


def test_the_shipped_references_are_1200_different_pictures_on_white(references: References) -> None:
    assert references.images.min() >= -1 and references.images.max() <= 1
    distance = torch.cdist(references.images.flatten(1)[::7], references.images.flatten(1))
    assert (distance < 0.5).sum() == len(references.images[::7])
    assert (references.images[:, :, 0, 0] > 0.9).all(dim=1).float().mean() > 0.95


def test_the_shipped_references_name_their_licences_and_stay_small(references: References) -> None:
    assert {source["style"]: source["licence"] for source in references.sources} == {
        "3d": "MIT",
        "flat": "MIT",
        "noto": "Apache-2.0",
        "twitter": "CC-BY-4.0",
    }
    assert PICTURE.stat().st_size + DESCRIPTION.stat().st_size < 1_500_000


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    made = References(torch.rand(7, 3, 4, 4) * 2 - 1, tuple("abcdefg"), torch.arange(7) % 3 == 0, ({"style": "a"},))
    save_references(made, tmp_path / "r.png", columns=3)
    read = load_references(tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").size == (12, 12)
    assert (read.images - made.images).abs().max() <= 1 / 255 + 1e-6
    assert read.captions == made.captions and read.sources == made.sources
    assert read.held_out.tolist() == made.held_out.tolist()


def test_captions_that_do_not_fit_the_pictures_are_refused() -> None:
    with pytest.raises(DAVAEError, match=r"2 reference captions \(1 different ones\)"):
        References(torch.zeros(2, 3, 4, 4), ("a", "a"), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(DAVAEError, match="held-out marks"):
        References(torch.zeros(2, 3, 4, 4), ("a", "b"), torch.zeros(3, dtype=torch.bool))


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    save_references(References(torch.zeros(2, 3, 4, 4), ("a", "b"), torch.tensor([False, True])), tmp_path / "r.png")
    description = tmp_path / "r.json"
    whole = description.read_text()
    description.write_text(whole[:40])
    with pytest.raises(DAVAEError, match=r"r\.json cannot be read.*davae_core\.training\.tiny\.references"):
        load_references(tmp_path / "r.png")
    description.write_text(json.dumps({**json.loads(whole), "held_out": ["c"]}))
    with pytest.raises(DAVAEError, match="holds out captions that it does not list"):
        load_references(tmp_path / "r.png")
    description.write_text(json.dumps({**json.loads(whole), "size": 5}))
    with pytest.raises(DAVAEError, match=r"r\.png is 200 x 4 px, expected 250 x 5 for 2 pictures of 5 px"):
        load_references(tmp_path / "r.png")
    description.unlink()
    with pytest.raises(DAVAEError, match="does not exist"):
        load_references(tmp_path / "r.png")


def test_style_is_the_first_word_and_name_the_rest() -> None:
    assert split("3d red heart") == ("3d", "red heart")


CAPTIONS = Captions(("3d", "flat"), {"red heart": "2764", "peach": "1f351"}, frozenset({("flat", "peach")}), 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared data of 16 px whose top left 4 x 4 pixels are black and white by turns."""
    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[:4:2, :4] = 0
    for part, style, name in (
        ("train", "3d", "red-heart"),
        ("train", "3d", "peach"),
        ("train", "flat", "red-heart"),
        ("held_out", "flat", "peach"),
    ):
        file = tmp_path / "data" / part / style / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return tmp_path / "data"


def test_references_are_made_from_prepared_data_by_averaging(data: Path) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("resvg_py")
    from davae_core.training.tiny.references import build

    made = build(data, CAPTIONS)
    assert made.captions == ("3d red heart", "3d peach", "flat red heart", "flat peach")
    assert made.held_out.tolist() == [False, False, False, True]
    assert made.images.shape == (4, 3, 4, 4)
    assert made.images[0, 0, 0].tolist() == [0, 1, 1, 1]  # half black, half white
    assert build(data, CAPTIONS, size=8).images.shape == (4, 3, 8, 8)


def test_a_missing_or_misshapen_image_is_named(data: Path) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("resvg_py")
    from davae_core.training.tiny.references import build

    with pytest.raises(DAVAEError, match="a multiple of 5 px"):
        build(data, CAPTIONS, size=5)
    (data / "held_out" / "flat" / "peach.png").unlink()
    with pytest.raises(DAVAEError, match=r"peach\.png is missing; prepare the data"):
        build(data, CAPTIONS)


def test_images_survive_writing_and_reading(tmp_path: Path) -> None:
    x = torch.rand(3, 10, 6) * 2 - 1
    images.save_image(tmp_path / "new" / "x.png", x)
    assert (images.read_image(tmp_path / "new" / "x.png") - x).abs().max() <= 1 / 255 + 1e-6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


def test_what_is_transparent_is_white_and_a_turned_photo_stands_upright(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (images.read_image(tmp_path / "clear.png") == 1).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.read_image(tmp_path / "turned.jpg").shape == (3, 4, 2)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DAVAEError, match=r"text\.png is not a readable image"):
        images.read_image(tmp_path / "text.png")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match="holds no images"):
        images.find_images(tmp_path)
    with pytest.raises(DAVAEError, match="is not a folder"):
        images.find_images(tmp_path / "nowhere")


def test_a_mosaic_goes_row_by_row_and_comes_apart_again() -> None:
    x = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2) / 10
    whole = images.mosaic(x, 3)
    assert whole.shape == (3, 4, 6)
    assert whole[0, ::2, ::2].tolist() == pytest.approx(torch.tensor([[0, 0.1, 0.2], [0.3, 0.4, 1.0]]).numpy())
    assert torch.equal(images.parts(whole, 2)[:5], x)
