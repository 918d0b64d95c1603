"""Images for the tiny models: ``python -m davae_core.training.tiny.data --out DIR --size 128``.

Five packages of the npm registry, pinned and checked, become ``train/``, ``held_out/`` and ``other/``, each with one
folder per style that holds ``NAME.png`` (RGB on white) and ``NAME.txt`` (its caption). The captions of ``train`` are
what the tiny models must learn; ``other`` helps to learn it, and ``held_out`` is for measuring alone. ``manifest.json``
is written last.
"""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import resvg_py
import tyro
from PIL import Image

from ... import atomic
from ...checkpoints import foreign_json
from ...errors import DAVAEError
from ...images import on_white
from .captions import Captions, load_captions

PARTS = ("train", "held_out", "other")
Draw = Callable[[int], Image.Image]
"""Draws one image, RGB and square, at the given size."""


@dataclass(frozen=True)
class Archive:
    """One pinned package of the npm registry."""

    package: str
    version: str
    licence: str
    sha512: str
    """As npm writes it: base64, without the leading ``sha512-``."""

    @property
    def filename(self) -> str:
        """The name that ``npm pack`` gives the file."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


# Labels of the emoji under "labels"; one archive of drawings for each style.
ARCHIVES = {
    "labels": Archive(
        "emojibase-data",
        "17.0.0",
        "MIT",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ),
    "3d": Archive(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "flat": Archive(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "noto": Archive(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twitter": Archive(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
}


@dataclass(frozen=True)
class DataConfig:
    """Download, check and render the images of the tiny models."""

    out: Path = Path("output/data/tiny")
    """Folder to write. One folder holds one size; a run that was cut off goes on where it was."""
    size: int = 128
    """Width and height of the images, in pixels."""
    archives: Path | None = None
    """Folder with .tgz files put there by hand; what is found there is not downloaded."""
    downloads: Path = Path("output/data/downloads")
    """Folder that keeps downloaded .tgz files for the next time."""


# --- archives ---------------------------------------------------------------------------------------------------------


def check(path: Path, archive: Archive) -> None:
    """Compare a file with the pinned checksum. DAVAEError if they differ."""
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != archive.sha512:
        raise DAVAEError(
            f"{path} is not {archive.package} {archive.version}: its sha512 is {found}, expected {archive.sha512}. "
            "Delete the file and run again."
        )


def obtain(archive: Archive, archives: Path | None, downloads: Path) -> Path:
    """Find an archive in one of the two folders or download it into the second, and check it.

    Raises DAVAEError if the file is wrong, or if it is missing and npm cannot get it.
    """
    for folder in (archives, downloads):
        if folder is not None and (folder / archive.filename).is_file():
            check(folder / archive.filename, archive)
            return folder / archive.filename
    by_hand = f"or put {archive.filename} into a folder and give that as --archives"
    npm = shutil.which("npm")
    if npm is None:
        raise DAVAEError(f"{archive.filename} has to be downloaded, but npm was not found. Install npm, {by_hand}.")
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as part:
        command = [npm, "pack", f"{archive.package}@{archive.version}", "--pack-destination", part, "--loglevel=error"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        file = Path(part) / archive.filename
        if done.returncode or not file.is_file():
            said = "; ".join([line for line in done.stderr.splitlines() if "warn" not in line][:4])
            raise DAVAEError(f"npm could not get {archive.filename}: {said}. Try again, {by_hand}.")
        check(file, archive)
        return file.replace(downloads / archive.filename)


def read_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read the wanted files of a .tgz into memory, by their name below the package's folder."""
    files = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if wanted(name) and (stream := tar.extractfile(member)) is not None:
                files[name] = stream.read()
    return files


def read_json(path: Path, *names: str) -> list[Any]:
    """Read JSON files of a .tgz. DAVAEError if one is missing."""
    files = read_members(path, names.__contains__)
    if missing := [name for name in names if name not in files]:
        raise DAVAEError(f"{path} has no {', '.join(missing)}: is it the right package?")
    return [json.loads(files[name]) for name in names]


# --- names and drawings -----------------------------------------------------------------------------------------------


def plain_codepoints(codepoints: str) -> str:
    """Give code points in lower case and without the variation selector: ``2764-FE0F`` is ``2764``."""
    return "-".join(point for point in codepoints.lower().split("-") if point != "fe0f")


def plain_name(label: str) -> str:
    """Give a label in words of a-z and 0-9: accents and apostrophes go, other signs part words."""
    text = unicodedata.normalize("NFKD", label.lower())
    text = "".join(c for c in text if not unicodedata.combining(c) and c not in "'\u2019")
    return " ".join(re.findall("[a-z0-9]+", text))


def read_names(path: Path) -> dict[str, str]:
    """Map name to code points, for emoji that are no flags, keycaps, skin tones or letters of flags."""
    components, flags = 2, 9
    names: dict[str, str] = {}
    for emoji in read_json(path, "en/data.json")[0]:
        if emoji.get("group", components) not in (components, flags) and not emoji["label"].startswith("keycap"):
            names.setdefault(plain_name(emoji["label"]), plain_codepoints(emoji["hexcode"]))
    return names


def draw_picture(data: bytes, size: int) -> Image.Image:
    """Decode a picture, put it on white, and resize it where it has another size."""
    image = on_white(Image.open(io.BytesIO(data)))
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)


def draw_icon(icon: Mapping[str, Any], defaults: Mapping[str, Any], size: int) -> Image.Image:
    """Render an icon of Iconify's JSON on white, centred. What the icon leaves out is in `defaults`, its set."""
    box = {"left": 0, "top": 0, "width": 16, "height": 16}
    view = " ".join(str(icon.get(key, defaults.get(key, value))) for key, value in box.items())
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'width="{size}" height="{size}" viewBox="{view}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    return on_white(Image.open(io.BytesIO(png)))


def read_pictures(path: Path) -> dict[str, Draw]:
    """Map code points to drawings, for a package of ``assets/CODEPOINTS.webp``."""
    files = read_members(path, lambda name: name.startswith("assets/") and name.endswith(".webp"))
    return {plain_codepoints(Path(name).stem): partial(draw_picture, data) for name, data in files.items()}


def read_icons(path: Path) -> dict[str, Draw]:
    """Map code points to drawings, for an icon set in Iconify's JSON."""
    chars, icons = read_json(path, "chars.json", "icons.json")
    return {
        plain_codepoints(codepoints): partial(draw_icon, icons["icons"][name], icons)
        for codepoints, name in chars.items()
        if name in icons["icons"]
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def plan_images(captions: Captions, others: list[str]) -> list[tuple[str, str, str]]:
    """List (part, style, name) of every image; `others` are names outside the captions."""
    return [
        ("held_out" if (style, name) in captions.held_out else part, style, name)
        for part, names in (("train", captions.names), ("other", others))
        for style in captions.styles
        for name in names
    ]


def summary(config: DataConfig, captions: Captions, archives: Mapping[str, Archive]) -> dict[str, Any]:
    """Say what the images depend on; two folders with the same summary hold the same images."""
    text = json.dumps([captions.styles, captions.names, sorted(captions.held_out)])
    return {
        "size": config.size,
        "captions": hashlib.sha256(text.encode()).hexdigest(),
        "archives": {a.filename: {"sha512": a.sha512, "licence": a.licence} for a in archives.values()},
    }


def is_complete(out: Path, expected: Mapping[str, Any]) -> bool:
    """Say whether a folder already holds what is asked for. DAVAEError if it holds something else."""
    for name in ("manifest.json", "manifest.json.unfinished"):
        if (out / name).is_file():
            manifest = foreign_json.read(out / name)
            if other := [key for key, value in expected.items() if manifest.get(key) != value]:
                raise DAVAEError(
                    f"{out} holds images of {manifest.get('size')} px, {expected['size']} px was asked for; "
                    f"what differs: {', '.join(other)}. Give another folder as --out, or delete this one."
                )
            counts = manifest.get("counts")
            return counts == {part: len(list((out / part).glob("*/*.png"))) for part in PARTS}
    if any((out / part).exists() for part in PARTS):
        raise DAVAEError(f"{out} holds images but no manifest. Give another folder as --out, or delete this one.")
    return False


def prepare(config: DataConfig, captions: Captions, archives: Mapping[str, Archive]) -> dict[str, int]:
    """Write all images and the manifest, and give the number of images by part.

    `archives` has "labels" and one archive for each style of the captions. What is there already is kept.
    Raises DAVAEError if the size is below 1, an archive is wrong or missing, or the folder holds something else.
    """
    if config.size < 1:
        raise DAVAEError(f"--size is {config.size}; expected the width of the images in pixels, for example 128.")
    start = time.monotonic()
    expected = summary(config, captions, archives)
    if is_complete(config.out, expected):
        counts: dict[str, int] = foreign_json.read(config.out / "manifest.json")["counts"]
        print(f"{config.out} is complete: {counts}. Nothing to do.")
        return counts
    paths = {key: obtain(archive, config.archives, config.downloads) for key, archive in archives.items()}
    names = read_names(paths["labels"])
    draw = {
        style: read_pictures(paths[style]) if style == "3d" else read_icons(paths[style]) for style in captions.styles
    }
    drawn = {name for name, code in names.items() if all(code in drawings for drawings in draw.values())}
    if missing := [name for name, code in captions.names.items() if name not in drawn or names[name] != code]:
        raise DAVAEError(f"The archives do not draw {', '.join(missing)} in every style: do they fit the captions?")

    images = plan_images(captions, [name for name in names if name in drawn and name not in captions.names])
    config.out.mkdir(parents=True, exist_ok=True)
    atomic.write(config.out / "manifest.json.unfinished", json.dumps(expected, indent=1).encode())
    counts = dict.fromkeys(PARTS, 0)
    for done, (part, style, name) in enumerate(images, 1):
        file = config.out / part / style / f"{name.replace(' ', '-')}.png"
        counts[part] += 1
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            draw[style][names[name]](config.size).save(buffer, "png")
            atomic.write(file.with_suffix(".txt"), f"{style} {name}".encode())
            atomic.write(file, buffer.getvalue())
        if done % 500 == 0 or done == len(images):
            print(f"{done} of {len(images)} images, {time.monotonic() - start:.0f} s", flush=True)
    sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths.values()}
    manifest = {**expected, "sha256": sha256, "counts": counts}
    atomic.write(config.out / "manifest.json", json.dumps(manifest, indent=1).encode())
    (config.out / "manifest.json.unfinished").unlink()
    return counts


def main() -> None:
    """Run from the command line."""
    config = tyro.cli(DataConfig, description=__doc__)
    try:
        prepare(config, load_captions(), ARCHIVES)
    except DAVAEError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
