import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from davae_core.errors import DAVAEError
from davae_core.training.data import pictures
from davae_core.training.data.listing import Source, examined
from davae_core.training.data.sources import find, index


def picture(number: int = 0, size: tuple[int, int] = (12, 8)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def folder(path: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def shard(path: Path, files: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def looked_at(source: Source) -> Source:
    seen = examined(source)
    assert isinstance(seen, Source), seen
    return seen


def pixels(source: Source) -> np.ndarray:
    return np.asarray(source.open())


PNG = encoded(picture())


def test_folders_are_searched_to_the_bottom_in_a_stable_order(tmp_path: Path) -> None:
    names = ["b/z.png", "a.jpg", "b/a/x.webp", "c.JPEG", "a-b/d.bmp"]
    where = folder(tmp_path, dict.fromkeys([*names, "notes.md", ".hidden.png", ".thumbs/e.png"], PNG))
    assert [Path(source.name).relative_to(tmp_path).as_posix() for source in index([where])] == sorted(names)


def test_entries_keep_the_order_they_were_given_in(tmp_path: Path) -> None:
    first = folder(tmp_path / "z", {"1.png": PNG})
    second = shard(tmp_path / "a.tar", {"2.png": PNG})
    assert [Path(source.name).name for source in index([first, second])] == ["1.png", "2.png"]
    assert [Path(source.name).name for source in index([second, first])] == ["2.png", "1.png"]


CAPTIONS = {
    "text": ({"x.txt": "a dog \n"}, ("a dog",)),
    "key": ({"x.json": '{"caption": "a cat", "width": 3}'}, ("a cat",)),
    "list of captions": ({"x.json": '{"caption": ["one", "two"]}'}, ("one", "two")),
    "list alone": ({"x.json": '["one", "two"]'}, ("one", "two")),
    "text before json": ({"x.txt": "text", "x.json": '{"caption": "json"}'}, ("text",)),
    "other json": ({"x.json": '{"width": 3}'}, ()),
    "null": ({"x.json": '{"caption": null}'}, ()),
    "none": ({}, ()),
    "empty": ({"x.txt": ""}, ()),
    "beyond ascii, with a byte order mark": ({"x.txt": "\ufeffgrün \u732b"}, ("grün \u732b",)),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_are_the_same_from_folders_and_from_shards(case: str, tmp_path: Path) -> None:
    beside, captions = CAPTIONS[case]
    files = {"x.png": PNG, **{name: text.encode() for name, text in beside.items()}}
    for where in (folder(tmp_path / "folder", files), shard(tmp_path / "x.tar", files)):
        (source,) = index([where])
        assert source.captions == captions
        assert source.caption == (captions[0] if captions else "")


@pytest.mark.parametrize("beside", [{"x.txt": b"\xff\xfe\x00"}, {"x.json": b'{"caption": '}, {"x.txt": PNG}])
def test_an_image_whose_caption_cannot_be_read_is_named_and_left_out(beside: dict[str, bytes], tmp_path: Path) -> None:
    found = find([folder(tmp_path, {"x.png": PNG, "y.png": PNG, **beside})])
    assert [Path(source.name).name for source in found.sources] == ["y.png"]
    (why,) = found.unreadable.values()
    assert f"its caption ({Path(next(iter(beside))).suffix}) cannot be read" in why


def test_shards_of_the_webdataset_library_read_like_the_folder_they_came_from(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    forms = ["png", "jpg", "webp"]
    pattern = str(tmp_path / "set-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i in range(10):
            form = forms[i % 3]
            content = encoded(picture(i), {"jpg": "JPEG"}.get(form, form.upper()))
            text = {"txt": f"picture {i}"} if i % 2 else {"json": {"caption": [f"picture {i}", "so"], "id": i}}
            writer.write({"__key__": f"{i:06d}", form: content, **text})
            beside = {
                f"{i:06d}.{name}": value if isinstance(value, str) else json.dumps(value)
                for name, value in text.items()
            }
            folder(tmp_path / "plain", {f"{i:06d}.{form}": content} | {n: v.encode() for n, v in beside.items()})
    expected = index([str(tmp_path / "plain")])
    found = index([str(tmp_path / "set-{000..002}.tar")])
    assert len(expected) == 10
    assert [source.captions for source in found] == [source.captions for source in expected]
    assert [looked_at(one).identity for one in found] == [looked_at(one).identity for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(pixels(one), pixels(other))
    assert index([str(tmp_path / "set-*.tar")]) == found


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    files = {"d/b.png": PNG, "d/a.txt": b"first", "c.txt": b"third", "d/b.txt": b"second", "d/a.jpg": PNG, "c.png": PNG}
    found = index([shard(tmp_path / "x.tar", files)])
    assert [(Path(source.name).name, source.caption) for source in found] == [
        ("c.png", "third"),
        ("a.jpg", "first"),
        ("b.png", "second"),
    ]


def test_what_else_a_sample_holds_is_left_out(tmp_path: Path) -> None:
    files = {"a.png": PNG, "a.mask.png": PNG, "a.cls": b"3", "._b.png": PNG}
    assert [Path(source.name).name for source in index([shard(tmp_path / "x.tar", files)])] == ["a.png"]


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [("s{8..11}", "8 9 10 11"), ("s{08..11}", "08 09 10 11"), ("s{08,10}", "08 10"), ("s{0,1}{8..9}", "08 09 18 19")],
)
def test_braces_count_and_list(pattern: str, numbers: str, tmp_path: Path) -> None:
    for number in ("8", "9", "10", "11", "08", "09", "18", "19"):
        shard(tmp_path / f"s{number}.tar", {"a.png": PNG})
    found = index([str(tmp_path / f"{pattern}.tar")])
    assert [Path(source.file).stem for source in found] == [f"s{number}" for number in numbers.split()]


def test_one_missing_shard_of_a_range_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "s0.tar", {"a.png": PNG})
    with pytest.raises(DAVAEError, match=r"s1\.tar"):
        index([str(tmp_path / "s{0..1}.tar")])


def test_a_folder_may_have_the_characters_of_a_pattern_in_its_name(tmp_path: Path) -> None:
    assert len(index([folder(tmp_path / "a[1] {b}", {"x.png": PNG})])) == 1


def test_every_place_a_shard_can_be_cut_at_is_noticed(tmp_path: Path) -> None:
    whole = Path(shard(tmp_path / "whole.tar", {f"{i}.png": PNG for i in range(3)})).read_bytes()
    end = 3 * (512 + -(-len(PNG) // 512) * 512)
    for length in {0, 1, 511, 512, 513, 512 + len(PNG) // 2, *range(1024, end, 300), *range(512, end + 1, 512)}:
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:length])
        with pytest.raises(DAVAEError, match=r"cut\.tar is cut short"):
            index([str(cut)])


def test_a_shard_that_is_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    path = Path(shard(tmp_path / "bad.tar", {f"{i}.png": PNG for i in range(3)}))
    content = bytearray(path.read_bytes())
    second = 512 + -(-len(PNG) // 512) * 512
    content[second + 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DAVAEError, match=rf"bad\.tar is cut short or damaged at byte {second:,}"):
        index([str(path)])


def test_a_shard_that_is_cut_short_is_reported_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        shard(tmp_path / f"s{number}.tar", {f"{number}{letter}.png": PNG for letter in "ab"})
    cut = tmp_path / "s1.tar"
    cut.write_bytes(cut.read_bytes()[: 512 + len(PNG) // 2])
    found = index([str(tmp_path / "s{0..2}.tar")])
    assert [Path(source.name).name for source in found] == ["0a.png", "0b.png", "2a.png", "2b.png"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"the shard {cut} is cut short or damaged (unexpected end of data); write it again. The training goes on "
        "without its images"
    ]


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(mode: str, tmp_path: Path) -> None:
    for name in (f"x.tar.{mode}", "x.tar"):
        with pytest.raises(DAVAEError, match="is compressed with"):
            index([shard(tmp_path / name, {"a.png": PNG}, f"w:{mode}")])


def test_what_holds_no_images_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "missing"): "there is no",
        str(tmp_path / "x-*.tar"): "no file matches",
        str(tmp_path / "empty"): "holds no images",
        folder(tmp_path / "shards", {"a.tar": b""}): r"for the shards in it give .*\*\.tar",
        shard(tmp_path / "texts.tar", {"a.txt": b"x"}): r"shard .*texts\.tar holds no images",
        str(tmp_path / "one.png"): "neither a folder nor",
    }
    folder(tmp_path, {"one.png": PNG})
    for entry, message in cases.items():
        with pytest.raises(DAVAEError, match=message):
            index([entry])
    with pytest.raises(DAVAEError, match="no images to train on"):
        index([])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", *pictures._AVIF])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int, form: str, tmp_path: Path) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # white in the upper left corner
    # How a camera stores what it saw: the inverse of what the orientation asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif)
    for where in (folder(tmp_path / "f", {"x.png": content}), shard(tmp_path / "x.tar", {"x.png": content})):
        source = looked_at(index([where])[0])
        assert source.size == source.open().size == (32, 16)
        assert np.abs(pixels(source).astype(int) - upright).mean() < 6


@pytest.mark.parametrize(("form", "mode"), [("PNG", "RGBA"), ("WEBP", "RGBA"), ("PNG", "LA")])
def test_transparency_is_laid_over_white(form: str, mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    (source,) = index(
        [
            folder(
                tmp_path,
                {"x.png": encoded(image.convert(mode), form, **({"lossless": True} if form == "WEBP" else {}))},
            )
        ]
    )
    assert pixels(source)[0, :, 0].tolist() == [255, 0, 127]


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 1)
    (source,) = index([folder(tmp_path, {"x.png": encoded(image, transparency=0)})])
    assert pixels(source)[0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_greys_of_16_bits_keep_their_brightness(tmp_path: Path) -> None:
    grey = np.array([[0, 257 * 100 - 128, 257 * 100 + 128, 65535]], dtype=np.uint16)
    (source,) = index([folder(tmp_path, {"x.png": encoded(Image.fromarray(grey))})])
    assert pixels(source)[0].tolist() == [[0] * 3, [100] * 3, [100] * 3, [255] * 3]


@pytest.mark.parametrize(("colours", "kind"), [(3, 2), (4, 6)])
def test_colours_of_16_bits_keep_their_brightness(colours: int, kind: int, tmp_path: Path) -> None:
    row = b"\0" + struct.pack(f">{colours}H", *[0x4000, 0x8000, 0xC000, 0xFFFF][:colours])
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (source,) = index([folder(tmp_path, {"x.png": content})])
    assert pixels(source)[0, 0].tolist() == [0x40, 0x80, 0xC0]


def test_a_large_jpeg_is_decoded_no_larger_than_twice_what_is_needed(tmp_path: Path) -> None:
    y, x = np.mgrid[0:800, 0:1200] / 50
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1) * 100 + 128
    (source,) = index([folder(tmp_path, {"x.jpg": encoded(Image.fromarray(waves.astype(np.uint8)), "JPEG")})])
    small, whole = source.open(at_least=(96, 64)), source.open()
    assert (small.size, whole.size) == ((300, 200), (1200, 800))
    difference = np.asarray(small.resize((96, 64))).astype(int) - np.asarray(whole.resize((96, 64)))
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_all_colour_models_become_rgb(mode: str, tmp_path: Path) -> None:
    white = Image.new("RGB", (4, 4), "white").convert(mode)
    content = encoded(white, "JPEG" if mode == "CMYK" else "PNG")
    (source,) = index([folder(tmp_path, {"x.png": content})])
    assert (source.open().mode, pixels(source).min()) == ("RGB", 255)


def test_sizes_are_read_from_the_header_alone(tmp_path: Path) -> None:
    big = encoded(picture(size=(400, 300)))
    found = index([folder(tmp_path, {"a.png": big[:200], "b.png": b"no image", "c.png": PNG})])
    sizes = [seen.size if isinstance(seen, Source) else seen for seen in map(examined, found)]
    assert sizes == [(400, 300), f"it is damaged or no picture; read are {', '.join(pictures.FORMATS)}", (12, 8)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_raise_only_what_counts_as_unreadable(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    dice = np.random.default_rng(0)
    broken = 0
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        content = encoded(picture(size=(40, 30)), form, **({} if form in ("BMP", "GIF") else {"exif": exif}))
        for _ in range(150):
            bad = bytearray(content)
            for place in dice.integers(0, min(len(bad), 400), 3):
                bad[place] = dice.integers(0, 256)
            path = tmp_path / "x.png"
            path.write_bytes(bad[: dice.integers(1, len(bad) + 1)] if dice.random() < 0.3 else bad)
            source = Source("x", str(path))
            try:
                source.open()
            except pictures.UNREADABLE as problem:
                broken += 1
                assert source.reason(problem)
            assert isinstance(examined(source), (Source, str))
    assert broken > 100
