"""Images that are measured on are never trained on, and come in the same order every time."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from davae_core.errors import DAVAEError
from davae_core.training.data.config import DataConfig
from davae_core.training.data.dataset import held_out, loader
from davae_core.training.data.survey import collect


def paint(path: Path, number: int, size: tuple[int, int] = (24, 16)) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Forty images of two shapes, and copies of ten of them."""
    for i in range(40):
        paint(tmp_path / "photos" / f"{i}.png", i, (24, 16) if i % 2 else (16, 24))
    for i in range(10):
        paint(tmp_path / "photos" / f"{i}_copy.png", i, (24, 16) if i % 2 else (16, 24))
    return DataConfig((str(tmp_path / "photos"),), size=16, workers=0, held_out=("25%",))


def trained(config: DataConfig) -> set[str]:
    return {Path(name).name for batch in loader(config, 4, 0, 8, steps=60) for name in batch["name"]}


def held(config: DataConfig, batch: int = 4, **options: Any) -> list[str]:
    return [Path(name).name for some in held_out(config, 8, batch, **options) for name in some["name"]]


def test_no_image_is_on_both_sides_nor_is_a_copy_of_one(config: DataConfig) -> None:
    seen, aside = trained(config), set(held(config))
    assert len(seen) + len(aside) == 50 and 4 <= len(aside) <= 20 and not seen & aside
    assert not {name.replace("_copy", "") for name in seen} & {name.replace("_copy", "") for name in aside}


def test_a_share_does_not_depend_on_names_or_on_the_other_images(config: DataConfig, tmp_path: Path) -> None:
    before = {name for name in held(config) if "copy" not in name}
    for path in (tmp_path / "photos").glob("*_copy.png"):
        path.unlink()
    paint(tmp_path / "photos" / "more.png", 99)
    assert set(held(config)) - {"more.png"} == before


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("buckets", [False, True])
def test_the_order_and_the_pixels_are_always_the_same(config: DataConfig, world: int, buckets: bool) -> None:
    config = replace(config, random_crop=True, buckets=buckets, size=24, enlarge=True)
    whole = list(held_out(config, 8, 3))
    parts = [list(held_out(config, 8, 3, rank=rank, world=world)) for rank in range(world)]
    assert len({len(batch["name"]) for batch in whole}) > 1 or len(whole) > 1
    for i, batch in enumerate(whole):
        again = parts[i % world][i // world]
        assert again["name"] == batch["name"] and torch.equal(again["image"], batch["image"])
        assert (batch["step"], batch["share"], batch["position"].dtype) == (0, 1.0, torch.int64)
    assert sorted(int(place) for batch in whole for place in batch["position"]) == list(range(len(held(config))))
    assert len(held(config, limit=3)) == 3


def test_folders_can_be_held_out_even_inside_the_others(config: DataConfig, tmp_path: Path) -> None:
    paint(tmp_path / "photos" / "aside" / "x.png", 100)
    paint(tmp_path / "apart" / "y.png", 101)
    paint(tmp_path / "apart" / "small.png", 102, (8, 8))
    (tmp_path / "apart" / "broken.png").write_bytes(b"")
    shutil.copy(tmp_path / "photos" / "3.png", tmp_path / "apart" / "z.png")
    config = replace(config, held_out=(str(tmp_path / "photos" / "aside"), str(tmp_path / "apart")))
    assert held(config) == ["x.png", "y.png", "z.png"]
    assert len(trained(config)) == 48 and not {"3.png", "3_copy.png"} & trained(config)
    told = collect(config, 8).table.told()
    assert (told["found"], told["taken"]["held out"]) == (55, 3)
    counts = {what.split(" (")[0]: line["count"] for what, line in told["left_out"].items()}
    assert counts == {"unreadable": 1, "smaller than the training's size": 1, "held out": 3}


def test_nothing_is_held_out_unless_asked_for_and_then_at_least_one(config: DataConfig, tmp_path: Path) -> None:
    assert held(replace(config, held_out=())) == []
    for path in sorted((tmp_path / "photos").iterdir())[3:]:
        path.unlink()
    assert len(held(replace(config, held_out=("0.1%",)))) == 1


@pytest.mark.parametrize("wrong", [("0%",), ("60%",), ("many%",), ("2%", "photos"), ("nan%",)])
def test_a_share_that_cannot_be_is_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(DAVAEError, match=r"one share above 0% and up to 50%"):
        DataConfig(("x",), held_out=wrong)
