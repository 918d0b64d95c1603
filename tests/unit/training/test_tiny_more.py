"""Further pictures for the predictor, from archives as small as can be."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from davae_core.errors import DAVAEError
from davae_core.training.tiny import more
from davae_core.training.tiny.data import Archive, DataConfig
from harness.archives import sha512, write_tgz

BODY = '<path fill="{}" d="M4 4h8v8H4z"/>'


def archive(folder: Path, name: str, icons: list[str], colour: str = "red") -> Archive:
    folder.mkdir(exist_ok=True)
    empty = Archive(f"@fake/{name}", "1.0.0", "MIT", "")
    path = folder / empty.filename
    told = {"icons": {icon: {"body": BODY.format(colour)} for icon in icons}, "width": 16, "height": 16}
    write_tgz(path, {"icons.json": json.dumps(told).encode()})
    return Archive(empty.package, empty.version, empty.licence, sha512(path))


def config(folder: Path, size: int = 32) -> DataConfig:
    return DataConfig(folder / "data", size, folder / "archives", folder / "downloads")


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Archive]:
    return {
        "one": archive(tmp_path / "archives", "one", ["cat", "dog-16", "dog-48", "dog-20"]),
        "two": archive(tmp_path / "archives", "two", ["cat", "waving-hand-dark-skin-tone", "flag-peru"], "blue"),
    }


def test_one_of_each_drawing() -> None:
    names = ["add-16", "add-48", "add-20", "hand", "hand-light-skin-tone", "flag-for-peru", "golf-hole", "2", "top-10"]
    assert more.distinct(names) == ["2", "add-48", "golf-hole", "hand", "top-10"]


def test_pictures_of_every_set(tmp_path: Path, sets: dict[str, Archive]) -> None:
    assert more.prepare(config(tmp_path), sets) == {"one": 2, "two": 1}
    files = sorted(path.relative_to(tmp_path / "data").as_posix() for path in tmp_path.glob("data/more/*/*"))
    assert files == ["more/one/cat.png", "more/one/dog-48.png", "more/two/cat.png"]
    pixels = np.array(Image.open(tmp_path / "data/more/two/cat.png"))
    assert pixels.shape == (32, 32, 3) and tuple(pixels[16, 16]) == (0, 0, 255) and tuple(pixels[0, 0]) == (255,) * 3


def test_it_goes_on_where_it_was(tmp_path: Path, sets: dict[str, Archive]) -> None:
    more.prepare(config(tmp_path), sets)
    kept, lost = tmp_path / "data/more/one/cat.png", tmp_path / "data/more/two/cat.png"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "data/more.json").rename(tmp_path / "data/more.json.unfinished")
    more.prepare(config(tmp_path), sets)
    assert lost.is_file() and kept.stat().st_mtime_ns == before
    assert (tmp_path / "data/more.json").is_file() and not (tmp_path / "data/more.json.unfinished").exists()


@pytest.mark.parametrize("change", ["size", "sets", "strange"])
def test_a_folder_of_other_pictures_is_left_alone(tmp_path: Path, sets: dict[str, Archive], change: str) -> None:
    more.prepare(config(tmp_path), sets)
    if change == "strange":
        (tmp_path / "data/more.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("data/**/*") if path.is_file()}
    wanted = {"one": sets["one"]} if change == "sets" else sets
    with pytest.raises(DAVAEError, match=r"more\.json|of 32 px or of other sets"):
        more.prepare(config(tmp_path, 64 if change == "size" else 32), wanted)
    assert {path: path.read_bytes() for path in tmp_path.glob("data/**/*") if path.is_file()} == before


def test_a_changed_archive_is_refused(tmp_path: Path, sets: dict[str, Archive]) -> None:
    archive(tmp_path / "archives", "two", ["cat", "mouse"])
    with pytest.raises(DAVAEError, match="sha512"):
        more.prepare(config(tmp_path), sets)


def test_a_size_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match="--size is 0"):
        more.prepare(config(tmp_path, 0), {})
