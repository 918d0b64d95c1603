"""The captions that ship, and the making of the images from archives as small as can be."""

import base64
import hashlib
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from davae_core import atomic
from davae_core.errors import DAVAEError
from davae_core.training.tiny.captions import Captions, load_captions
from davae_core.training.tiny.data import (
    ARCHIVES,
    Archive,
    DataConfig,
    draw_icon,
    draw_picture,
    obtain,
    plain_codepoints,
    plain_name,
    prepare,
)
from harness.archives import sha512, write_tgz

# Label, code points and group as emojibase has them; what is drawn is a square of one colour for each style.
EMOJI = [
    ("peach", "1F351", 4),
    ("T-Rex", "1F996", 3),
    ("red heart", "2764-FE0F", 0),
    ("woman’s hat", "1F452", 7),  # noqa: RUF001
    ("piñata", "1FA85", 6),
    ("kite", "1FA81", 6),
    ("only in noto", "1F31A", 5),
    ("light skin tone", "1F3FB", 2),
    ("flag: Peru", "1F1F5-1F1EA", 9),
    ("keycap: 10", "1F51F", 8),
]
COLOURS = {"3d": "red", "flat": "lime", "noto": "blue", "twitter": "black"}
CAPTIONS = Captions(
    styles=tuple(COLOURS),
    names={"peach": "1f351", "t rex": "1f996", "red heart": "2764", "womans hat": "1f452", "pinata": "1fa85"},
    held_out=frozenset({("3d", "t rex"), ("flat", "red heart"), ("noto", "womans hat"), ("twitter", "pinata")}),
    seed=0,
)


def webp(colour: str) -> bytes:
    """A square of 8 px in the middle of 16 transparent ones."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste(colour, (4, 4, 12, 12))
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, Archive]:
    """The five archives with the inner layout of the real ones, in tmp_path/archives, and their checksums."""
    folder = tmp_path / "archives"
    folder.mkdir()
    made = {key: Archive(f"@fake/{key}", "1.0.0", "MIT", "") for key in ARCHIVES}
    labels = [{"label": label, "hexcode": code, "group": group} for label, code, group in EMOJI]
    labels.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    for key, archive in made.items():
        if key == "labels":
            files = {"en/data.json": json.dumps(labels).encode(), "de/data.json": b"[]"}
        elif key == "3d":
            drawn = [code for label, code, _ in EMOJI if label != "only in noto"]
            files = {f"assets/{code.lower()}.webp": webp(COLOURS[key]) for code in drawn}
        else:
            body = f'<rect x="4" y="4" width="8" height="8" fill="{COLOURS[key]}"/>'
            drawn = [code for label, code, _ in EMOJI if label != "only in noto" or key == "noto"]
            icons = {"width": 16, "height": 16, "icons": {f"icon-{code}": {"body": body} for code in drawn}}
            chars = {plain_codepoints(code): f"icon-{code}" for code in drawn}
            files = {"chars.json": json.dumps(chars).encode(), "icons.json": json.dumps(icons).encode()}
        write_tgz(folder / archive.filename, files)
    return {key: Archive(a.package, a.version, a.licence, sha512(folder / a.filename)) for key, a in made.items()}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(tmp_path / "out", 16, tmp_path / "archives", tmp_path / "downloads")


def files_in(out: Path) -> dict[str, bytes]:
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}


# --- captions ---------------------------------------------------------------------------------------------------------


def test_there_are_300_names_in_four_styles_and_100_held_out_pairs() -> None:
    captions = load_captions()
    assert captions.styles == ("3d", "flat", "noto", "twitter")
    assert len(captions.names) == len(set(captions.names.values())) == 300
    assert len(captions.held_out_captions) == 100
    assert len(captions.training) == 1100
    assert not set(captions.training) & set(captions.held_out_captions)
    assert "3d peach" in captions.training


def test_each_name_is_held_out_at_most_once_and_each_style_25_times() -> None:
    held_out = load_captions().held_out
    assert max(Counter(name for _, name in held_out).values()) == 1
    assert set(Counter(style for style, _ in held_out).values()) == {25}


def test_every_word_style_and_name_of_a_held_out_pair_is_trained_on() -> None:
    captions = load_captions()
    pairs = [captions.split(caption) for caption in captions.training]
    assert {style for style, _ in captions.held_out} <= {style for style, _ in pairs}
    assert {name for _, name in captions.held_out} <= {name for _, name in pairs}
    assert captions.vocabulary() == sorted({word for caption in captions.training for word in caption.split()})


def test_the_held_out_pairs_follow_from_the_seed() -> None:
    captions = load_captions()
    names = sorted(captions.names)
    random.Random(captions.seed).shuffle(names)
    names.remove("peach")
    assert captions.held_out == {(captions.styles[i // 25], name) for i, name in enumerate(names[:100])}


def test_names_are_plain_words_and_captions_fit_eight_tokens() -> None:
    captions = load_captions()
    assert all(plain_name(name) == name for name in captions.names)
    assert all(plain_codepoints(code) == code for code in captions.names.values())
    assert max(len(text.split()) for text in captions.training + captions.held_out_captions) <= 6


def test_a_caption_is_split_into_style_and_name_and_others_are_refused() -> None:
    captions = load_captions()
    assert captions.split("3d t rex") == ("3d", "t rex")
    for text in ("peach", "3d", "3d nothing", "oil peach"):
        with pytest.raises(ValueError, match="not a caption"):
            captions.split(text)


# --- archives ---------------------------------------------------------------------------------------------------------


def test_the_pinned_checksums_are_sha512() -> None:
    assert {len(base64.b64decode(archive.sha512, validate=True)) for archive in ARCHIVES.values()} == {64}
    assert ARCHIVES["3d"].filename == "lobehub-fluent-emoji-3d-1.1.0.tgz"


def test_a_wrong_archive_is_refused_before_anything_is_written(
    archives: dict[str, Archive], config: DataConfig, tmp_path: Path
) -> None:
    path = tmp_path / "archives" / archives["noto"].filename
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DAVAEError, match=r"fake-noto-1\.0\.0\.tgz is not @fake/noto 1\.0\.0"):
        prepare(config, CAPTIONS, archives)
    assert not config.out.exists()


def test_without_npm_the_missing_file_is_named(
    archives: dict[str, Archive], config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "archives" / archives["flat"].filename).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DAVAEError, match=r"npm was not found.*fake-flat-1\.0\.0\.tgz into a folder.*--archives"):
        prepare(config, CAPTIONS, archives)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for npm is a shell script")
def test_what_npm_packs_is_checked_and_kept(
    archives: dict[str, Archive], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, downloads = archives["labels"], tmp_path / "downloads"
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\ncp "{tmp_path}/archives/$(cat "{tmp_path}/serves")" "$4/{archive.filename}"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")

    (tmp_path / "serves").write_text(archives["noto"].filename)
    with pytest.raises(DAVAEError, match="sha512"):
        obtain(archive, None, downloads)
    assert list(downloads.iterdir()) == []

    (tmp_path / "serves").write_text(archive.filename)
    assert obtain(archive, None, downloads) == downloads / archive.filename
    npm.write_text("#!/bin/sh\nexit 1\n")
    assert sha512(obtain(archive, None, downloads)) == archive.sha512
    (downloads / archive.filename).unlink()
    with pytest.raises(DAVAEError, match="npm could not get"):
        obtain(archive, None, downloads)


# --- images -----------------------------------------------------------------------------------------------------------


def test_every_pair_lands_in_its_part_with_its_caption(archives: dict[str, Archive], config: DataConfig) -> None:
    assert prepare(config, CAPTIONS, archives) == {"train": 16, "held_out": 4, "other": 4}
    files = files_in(config.out)
    captions = {
        part: {data.decode() for name, data in files.items() if name.startswith(part) and name.endswith(".txt")}
        for part in ("train", "held_out", "other")
    }
    assert captions["train"] == set(CAPTIONS.training)
    assert captions["held_out"] == set(CAPTIONS.held_out_captions)
    assert captions["other"] == {f"{style} kite" for style in CAPTIONS.styles}
    assert files["train/flat/womans-hat.txt"] == b"flat womans hat"
    assert len(files) == 2 * 24 + 1


def test_images_are_rgb_of_the_size_on_white(archives: dict[str, Archive], config: DataConfig) -> None:
    prepare(config, CAPTIONS, archives)
    for style, colour in COLOURS.items():
        image = Image.open(config.out / "train" / style / "peach.png")
        expected = Image.new("RGB", (16, 16), "white")
        expected.paste(colour, (4, 4, 12, 12))
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected), err_msg=style)


def test_the_manifest_names_archives_licences_and_counts(archives: dict[str, Archive], config: DataConfig) -> None:
    counts = prepare(config, CAPTIONS, archives)
    manifest = json.loads((config.out / "manifest.json").read_text())
    assert manifest["size"] == 16
    assert manifest["counts"] == counts
    assert manifest["archives"]["fake-3d-1.0.0.tgz"]["licence"] == "MIT"
    assert config.archives is not None
    data = (config.archives / "fake-3d-1.0.0.tgz").read_bytes()
    assert manifest["sha256"]["fake-3d-1.0.0.tgz"] == hashlib.sha256(data).hexdigest()


def test_a_second_run_needs_no_archives_and_writes_nothing(
    archives: dict[str, Archive], config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = prepare(config, CAPTIONS, archives)
    times = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    for archive in archives.values():
        assert config.archives is not None
        (config.archives / archive.filename).unlink()
    capsys.readouterr()
    assert prepare(config, CAPTIONS, archives) == counts
    assert "Nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}


def test_a_run_that_was_cut_off_goes_on_to_the_same_files(archives: dict[str, Archive], config: DataConfig) -> None:
    prepare(config, CAPTIONS, archives)
    whole = files_in(config.out)
    (config.out / "manifest.json").rename(config.out / "manifest.json.unfinished")
    for gone in ("train/noto/peach.png", "train/noto/peach.txt", "other/3d/kite.png"):
        (config.out / gone).unlink()
    aside = config.out / f"train/noto/.peach.png.killed{atomic.PART}"
    aside.mkdir()
    (aside / "peach.png").write_bytes(b"half")
    (aside / atomic.LOCK).touch()
    kept = config.out / "train" / "3d" / "peach.png"
    before = kept.stat().st_mtime_ns
    prepare(config, CAPTIONS, archives)
    assert files_in(config.out) == whole
    assert kept.stat().st_mtime_ns == before


def test_images_deleted_after_the_end_are_drawn_again(archives: dict[str, Archive], config: DataConfig) -> None:
    prepare(config, CAPTIONS, archives)
    whole = files_in(config.out)
    (config.out / "held_out/3d/t-rex.png").unlink()
    prepare(config, CAPTIONS, archives)
    assert files_in(config.out) == whole


def test_a_folder_with_something_else_is_refused(archives: dict[str, Archive], config: DataConfig) -> None:
    prepare(config, CAPTIONS, archives)
    larger = DataConfig(config.out, 32, config.archives, config.downloads)
    with pytest.raises(DAVAEError, match=r"16 px, 32 px was asked for; what differs: size"):
        prepare(larger, CAPTIONS, archives)
    other = Captions(CAPTIONS.styles, CAPTIONS.names, frozenset({("3d", "peach")}), 0)
    with pytest.raises(DAVAEError, match="what differs: captions"):
        prepare(config, other, archives)
    (config.out / "manifest.json").unlink()
    with pytest.raises(DAVAEError, match="no manifest"):
        prepare(config, CAPTIONS, archives)


def test_a_name_that_a_style_does_not_draw_is_named(archives: dict[str, Archive], config: DataConfig) -> None:
    captions = Captions(CAPTIONS.styles, {**CAPTIONS.names, "only in noto": "1f31a"}, CAPTIONS.held_out, 0)
    with pytest.raises(DAVAEError, match="do not draw only in noto"):
        prepare(config, captions, archives)
    assert not config.out.exists()


def test_a_size_below_one_is_refused(archives: dict[str, Archive], config: DataConfig) -> None:
    with pytest.raises(DAVAEError, match="--size is 0"):
        prepare(DataConfig(config.out, 0, config.archives), CAPTIONS, archives)


def test_an_icon_that_is_not_square_is_centred_within_its_own_box() -> None:
    icon = {"left": 10, "width": 20, "height": 40, "body": '<rect x="10" width="20" height="40" fill="currentColor"/>'}
    image = np.asarray(draw_icon(icon, {"width": 99, "height": 99, "left": 99}, 16))
    assert (image[:, 4:12] == 0).all()
    assert (image[:, :4] == 255).all()
    assert (image[:, 12:] == 255).all()


def test_a_picture_of_the_size_is_not_resampled_and_half_alpha_is_half_white() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[::2, ::2, 3] = 128
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "png")
    drawn = np.asarray(draw_picture(buffer.getvalue(), 16))
    assert set(np.unique(drawn[::2, ::2])) == {127}
    assert (drawn[1::2] == 255).all()
    assert draw_picture(buffer.getvalue(), 8).size == (8, 8)
