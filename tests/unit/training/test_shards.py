"""WebDataset shards as people write them: names, links, holes and members of one name."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from davae_core.training.data import shards
from davae_core.training.data.listing import Listing
from davae_core.training.data.sources import find


def picture(grey: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), grey).save(out, "PNG")
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", link: str = "", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    tar.addfile(member, io.BytesIO(content))


def read(path: Path) -> tuple[dict[str, tuple[int, str]], Listing]:
    """Grey and caption of each image, and what was not taken."""
    listing = find([str(path)])
    taken = {}
    for source in listing.sources:
        with source.open() as image:
            taken[source.name.removeprefix(f"{path}/")] = image.getpixel((0, 0))[0], source.caption
    return taken, listing


def left_out(listing: Listing, path: Path) -> dict[str, list[str]]:
    return {why: [name.removeprefix(f"{path}/") for name in names] for why, names in listing.left_out.items()}


NAMES = {
    "dots": (
        {"a.b.png": 1, "a.b.txt": "ab", "a.c.png": 2, "a.c.txt": "ac"},
        {"a.b.png": (1, "ab"), "a.c.png": (2, "ac")},
    ),
    "dots in folders": ({"v1.5/x.png": 1, "v1.5/x.txt": "x"}, {"v1.5/x.png": (1, "x")}),
    "upper case": ({"A.PNG": 1, "A.TXT": "A"}, {"A.PNG": (1, "A")}),
    "field with the sample's caption": ({"a.left.png": 1, "a.txt": "a"}, {"a.left.png": (1, "a")}),
    "caption file": ({"a.png": 1, "a.caption": "a"}, {"a.png": (1, "a")}),
    "beside an image with a caption": (
        {"a.png": 1, "a.txt": "a", "a.b.png": 2, "a.b.txt": "ab"},
        {"a.png": (1, "a"), "a.b.png": (2, "ab")},
    ),
    "braces and brackets": ({"{a} [1].png": 1, "{a} [1].txt": "x"}, {"{a} [1].png": (1, "x")}),
    "here": ({"./a.png": 1, "./a.txt": "a"}, {"a.png": (1, "a")}),
    "very long": ({"d" * 90 + "/" + "n" * 120 + ".png": 1, "d" * 90 + "/" + "n" * 120 + ".txt": "long"},
                  {"d" * 90 + "/" + "n" * 120 + ".png": (1, "long")}),
    "beyond ascii": ({"gr\xfcn.png": 1, "gr\xfcn.txt": "gr\xfcn"}, {"gr\xfcn.png": (1, "gr\xfcn")}),
}  # fmt: skip


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("case", NAMES)
def test_names_find_their_captions(case: str, layout: int, tmp_path: Path) -> None:
    members, expected = NAMES[case]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members.items():
            add(tar, name, picture(content) if isinstance(content, int) else content.encode())
    taken, listing = read(path)
    assert taken == expected and not listing.left_out


def test_fields_beside_an_image_and_captions_without_one_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "a.mask.png", "a.cls", "b.txt", ".c.png", "d/"):
            folder = name.endswith("/")
            add(tar, name, b"" if folder else picture(1), kind=tarfile.DIRTYPE if folder else tarfile.REGTYPE)
    taken, listing = read(path)
    assert taken == {"a.png": (1, "")}
    assert left_out(listing, path) == {
        shards.FIELD: ["a.mask.png"], "ending .cls": ["a.cls"], shards.ALONE: ["b.txt"], shards.HIDDEN: [".c.png"],
    }  # fmt: skip


def test_of_several_members_of_one_name_the_last_counts_as_tar_unpacks_them(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for grey in (1, 2, 3):
            add(tar, "a.png", picture(grey))
            add(tar, "a.txt", f"{grey}".encode())
    taken, listing = read(path)
    assert taken == {"a.png": (3, "3")}
    assert left_out(listing, path) == {shards.REPLACED: ["a.png", "a.txt", "a.png", "a.txt"]}


def test_links_are_followed_inside_the_shard_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "all/a.png", picture(7))
        add(tar, "all/a.txt", b"seven")
        add(tar, "hard.png", link="all/a.png", kind=tarfile.LNKTYPE)
        add(tar, "some/soft.png", link="../all/a.png", kind=tarfile.SYMTYPE)
        add(tar, "some/soft.txt", link="../all/a.txt", kind=tarfile.SYMTYPE)
        add(tar, "some/outside.png", link="/etc/passwd", kind=tarfile.SYMTYPE)
        add(tar, "round.png", link="turn.png", kind=tarfile.SYMTYPE)
        add(tar, "turn.png", link="round.png", kind=tarfile.SYMTYPE)
    taken, listing = read(path)
    assert taken == {"all/a.png": (7, "seven"), "hard.png": (7, ""), "some/soft.png": (7, "seven")}
    assert left_out(listing, path) == {shards.NOWHERE: ["some/outside.png", "round.png", "turn.png"]}


def test_members_with_holes_are_named(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture(5))
    with open(tmp_path / "holes.png", "wb") as file:
        file.write(picture(6))
        file.truncate(1 << 20)
    path = tmp_path / "x.tar"
    made = subprocess.run(["tar", "--sparse", "-cf", str(path), "-C", str(tmp_path), "good.png", "holes.png"])
    if made.returncode:
        pytest.skip("no GNU tar")
    taken, listing = read(path)
    assert taken == {"good.png": (5, "")}
    assert left_out(listing, path) == {shards.SPARSE: ["holes.png"]}
