"""A folder as people have them, and what becomes of each file in it."""

import io
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from davae_core.errors import DAVAEError
from davae_core.training.data.config import DataConfig
from davae_core.training.data.dataset import loader
from davae_core.training.data.pictures import ENDINGS
from davae_core.training.data.survey import Collection, collect

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n"
ORIENTATION = 0x0112


def encoded(
    number: int, form: str = "PNG", size: tuple[int, int] = (80, 72), mode: str = "RGB", **options: object
) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form, **options)
    return out.getvalue()


def grey(form: str, dtype: type) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((80, 80), 30000, dtype)).save(out, form)
    return out.getvalue()


def bomb() -> bytes:
    """A small PNG that says it has 60,000 x 60,000 pixels."""
    content = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
    return start + encoded(0)[len(start) :]


def turned() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(40, "JPEG", (80, 100), exif=exif)


def broken_avif() -> bytes:
    """An AVIF whose only picture is not the one that its header names."""
    return encoded(26, "AVIF").replace(b"pitm\0\0\0\0\0\1", b"pitm\0\0\0\0\0\7") if features.check("avif") else b"?"


SMALL, RUN = "smaller than the training's size", "in the folder of a run"
DAMAGED = "unreadable: it is damaged or no picture"
# File: (content, what becomes of it). A caption stands for an image that is taken.
FILES: dict[str, tuple[bytes, str]] = {
    # Captions.
    "good.png": (encoded(0), "a dog (the same picture as another)"),
    "good.txt": (b"a dog\n", ""),
    "UPPER.JPG": (encoded(1, "JPEG"), "upper case"),
    "UPPER.TXT": (b"upper case", ""),
    "kohya.webp": (encoded(2, "WEBP"), "a caption file"),
    "kohya.caption": (b"a caption file", ""),
    "list.bmp": (encoded(3, "BMP"), "one"),
    "list.json": (b'{"caption": ["one", "two"]}', ""),
    "bom.png": (encoded(4), "gr\xfcn"),
    "bom.txt": ("\ufeffgr\xfcn".encode(), ""),
    "latin.png": (encoded(5), "gr\xfcn, \u20ac (caption in Windows-1252)"),
    "latin.txt": ("gr\xfcn, \u20ac".encode("cp1252"), ""),
    "notepad.png": (encoded(6), "Gr\xfc\xdfe (caption in UTF-16)"),
    "notepad.txt": ("Gr\xfc\xdfe".encode("utf-16"), ""),
    "no_mark.png": (encoded(7), "Gr\xfc\xdfe (caption in UTF-16)"),
    "no_mark.txt": ("Gr\xfc\xdfe".encode("utf-16-be"), ""),
    "lines.png": (encoded(8), "a dog on a lawn"),
    "lines.txt": (b"a dog\r\n  on a lawn \r\n\r\n", ""),
    "2024.05.01 sea.jpeg": (encoded(9, "JPEG"), "the sea"),
    "2024.05.01 sea.txt": (b"the sea", ""),
    "{a,b} [1]/braces.png": (encoded(10), "in braces"),
    "{a,b} [1]/braces.txt": (b"in braces", ""),
    "alone.png": (encoded(11), "(no caption)"),
    "binary.png": (encoded(12), "unreadable: its caption (.txt) cannot be read (it is no text in UTF-8, UTF-16"),
    "binary.txt": (encoded(0), ""),
    "cut_short.png": (encoded(13), "unreadable: its caption (.json) cannot be read"),
    "cut_short.json": (b'{"caption": "a', ""),
    "orphan.txt": (b"nobody", "a caption without an image"),
    # Pictures of every kind that are taken.
    "wrong_name.png": (encoded(14, "JPEG"), "(no caption)"),
    "moving.gif": (encoded(15, "GIF", save_all=True, append_images=[Image.new("RGB", (80, 72))]), "(no caption)"),
    "scan.TIFF": (grey("TIFF", np.uint16), "(no caption)"),
    "print.jpg": (encoded(16, "JPEG", mode="CMYK"), "(no caption)"),
    "logo.png": (encoded(17, mode="P", transparency=0), "(no caption)"),
    "turned.jpg": (turned(), "(no caption)"),
    "copy of good.png": (encoded(0), "(no caption)"),
    # Those that are not.
    "thumbnail.png": (encoded(18, size=(80, 60)), SMALL),
    "panorama.png": (encoded(19, size=(6000, 40)), SMALL),
    "phone.heic": (b"\0\0\0\x18ftypheic", "ending .heic"),
    "raw.dng": (encoded(20, "TIFF"), "ending .dng"),
    "clip.MP4": (b"\0\0\0\x18ftypisom", "ending .mp4"),
    "Thumbs.db": (b"\xd0\xcf", "ending .db"),
    "README": (b"mine", "ending (none)"),
    ".hidden.png": (encoded(21), "hidden"),
    ".thumbs/x.png": (encoded(22), None),  # type: ignore[dict-item]
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unreadable: it is a HEIC picture"),
    "vector.png": (EPS, "unreadable: it is a PostScript (EPS) file"),
    "failed.jpg": (b"\n<!DOCTYPE html><title>404</title>", "unreadable: it is a web page"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "unreadable: it is a Git LFS pointer"),
    "empty.png": (b"", "unreadable: it is empty"),
    "stub.png": (encoded(23)[:12], "unreadable:"),
    "noise.webp": (b"\x9a" * 300, DAMAGED),
    "broken_avif.jpg": (broken_avif(), "unreadable:"),
    "bomb.png": (bomb(), "unreadable: it has more pixels than Pillow opens (Image size (3600000000 pixels)"),
    "float.tif": (grey("TIFF", np.float32), "unreadable: its pixels are numbers of 32 bits (mode F)"),
    "run/samples/step_500.png": (encoded(24), RUN),
    "older/state.safetensors": (b"", "ending .safetensors"),
    "older/samples/step_500.png": (encoded(25), RUN),
}


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, (content, _) in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    return folder


EXPECTED = {name: fate for name, (_, fate) in FILES.items() if fate} | {
    ".thumbs": "hidden",
    "gone.png": "unreadable: [Errno 2] No such file",
    "round": "a folder that was searched already",
    "pipe.png": "unreadable: it is no regular file",
}


def fates(found: Collection, folder: Path) -> dict[str, str]:
    """What became of each file, by name."""
    told = {}
    for source in found.sources:
        odd = "".join(f" ({what})" for what, names in found.table.noted.items() if source.name in names)
        told[source.name] = (source.caption or "(no caption)") + odd
    for why, names in found.table.left_out.items():
        for name in names:
            path, _, reason = name.partition(": ")
            told[path.partition(" (")[0] if why.startswith(SMALL) else path] = why + (f": {reason}" if reason else "")
    return {Path(name).relative_to(folder).as_posix(): fate for name, fate in told.items()}


def test_every_file_is_taken_or_named_with_the_reason(messy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a picture started a program")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    config = DataConfig((str(messy),), size=64, workers=0, max_broken=20)
    found = collect(config, 8, out=messy / "run")
    told = fates(found, messy)
    wrong = {
        name: (told.get(name), fate)
        for name, fate in EXPECTED.items()
        if not (
            told.get(name, "nothing").startswith(fate) if fate[0] in "usi" or fate == RUN else told.get(name) == fate
        )
    }
    assert not wrong
    assert told.keys() == EXPECTED.keys() and len(EXPECTED) > 45
    seen = [batch for batch in loader(config, 16, 0, 8, steps=2, collection=found)]
    assert all(batch["image"].isfinite().all() and not batch["broken"] for batch in seen)


def test_the_table_counts_and_names_and_is_kept_with_the_run(messy: Path, tmp_path: Path) -> None:
    table = collect(DataConfig((str(messy),), size=64, max_broken=20), 8, out=messy / "run").table
    told = json.loads(table.save(tmp_path).read_text(encoding="utf-8"))
    taken = told["taken"]
    assert taken["to train on"] == taken["with a caption"] + taken["without a caption"] == 19
    assert told["left_out"]["unreadable"]["count"] == 14 and len(told["left_out"]["unreadable"]["examples"]) == 3
    shown = str(table)
    for said in ("images found", "ending .heic", "--data.enlarge", "thumbnail.png (80 x 60)", "caption in UTF-16"):
        assert said in shown
    assert max(map(len, shown.splitlines())) < 1000


def test_more_unreadable_pictures_than_allowed_stop_the_run_with_all_reasons(messy: Path) -> None:
    with pytest.raises(
        DAVAEError, match=r"14 of \d+ images could not be read: .*bomb\.png: it has more pixels.*--data\."
    ):
        collect(DataConfig((str(messy),), size=64), 8, out=messy / "run")


def test_small_pictures_are_taken_when_asked_for(messy: Path) -> None:
    config = DataConfig((str(messy),), size=64, max_broken=20)
    few, more = (collect(replace(config, enlarge=enlarge), 8, out=messy / "run") for enlarge in (False, True))
    assert {Path(s.name).name for s in more.sources} - {Path(s.name).name for s in few.sources} == {
        "thumbnail.png",
        "panorama.png",
    }


def test_only_the_sheets_of_a_run_are_no_images_to_train_on(messy: Path) -> None:
    for place in ("older", "older/samples"):
        with pytest.raises(DAVAEError, match=r"lie in the folder of a run.*another folder for the run \(--run\.out\)"):
            collect(DataConfig((str(messy / place),), size=64), 8)


def test_every_ending_that_is_taken_is_documented(root: Path) -> None:
    guide = (root / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    assert [ending for ending in sorted(ENDINGS) if f"`{ending}`" not in guide] == []
