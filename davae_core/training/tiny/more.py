"""Further pictures for what needs no captions: ``python -m davae_core.training.tiny.more --out DIR --size 128``.

Five icon sets of the npm registry, pinned and checked, become ``DIR/more/SET/NAME.png``, RGB on white: for the
predictor, which remembers its pictures where they are few. No set is one of the tiny models' styles, so none of their
held-out pictures is among them. ``more.json`` is written last.
"""

import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tyro

from ... import atomic
from ...checkpoints import foreign_json
from ...errors import DAVAEError
from .data import Archive, DataConfig, draw_icon, obtain, read_json

FOLDER, MANIFEST = "more", "more.json"
AGAIN = re.compile(r"skin-tone|^flag")  # the same hand in five colours; flags, as in the other sets
SIZED = re.compile(r"^(.*)-(\d+)$")  # the same drawing for several sizes

SETS = {
    "emojione": Archive(
        "@iconify-json/emojione",
        "1.2.3",
        "CC-BY-4.0",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "fxemoji": Archive(
        "@iconify-json/fxemoji",
        "1.2.2",
        "Apache-2.0",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "streamline": Archive(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "CC-BY-4.0",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
    "fluent-color": Archive(
        "@iconify-json/fluent-color",
        "1.2.21",
        "MIT",
        "VETjGx7BMpVsCR3HV5g5t6oBGZ92XKzIRClS5xUvDn1YHAkQTF9OyF/aFdtxYOC8JROoI1SNO/Ql6jZeK7mroA==",
    ),
    "flat-color-icons": Archive(
        "@iconify-json/flat-color-icons",
        "1.2.3",
        "MIT",
        "KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w==",
    ),
}


def distinct(names: Iterable[str]) -> list[str]:
    """The names of an icon set without skin tones, flags and, of drawings for several sizes, all but the largest."""
    largest: dict[str, tuple[int, str]] = {}
    for name in names:
        if AGAIN.search(name):
            continue
        sized = SIZED.match(name)
        stem, size = (sized[1], int(sized[2])) if sized else (name, 0)
        largest[stem] = max(largest.get(stem, (-1, "")), (size, name))
    return sorted(name for _, name in largest.values())


def prepare(config: DataConfig, sets: Mapping[str, Archive] = SETS) -> dict[str, int]:
    """Write all pictures and the manifest; the number of pictures of each set. What is there already is kept.

    Raises:
        DAVAEError: the size is below 1, an archive is wrong or missing, or the folder holds pictures of another size or
            of other sets.
    """
    if config.size < 1:
        raise DAVAEError(f"--size is {config.size}; expected the width of the pictures in pixels, for example 128")
    expected = {"size": config.size, "archives": {a.filename: a.sha512 for a in sets.values()}}
    manifest, unfinished = config.out / MANIFEST, config.out / f"{MANIFEST}.unfinished"
    told = next((foreign_json.read(path) for path in (manifest, unfinished) if path.is_file()), None)
    if told is not None and {key: told.get(key) for key in expected} != expected:
        raise DAVAEError(
            f"{config.out / FOLDER} holds pictures of {told.get('size')} px or of other sets, {config.size} px was "
            "asked for. Give another folder as --out, or delete this one."
        )
    if told is None and (config.out / FOLDER).exists():
        raise DAVAEError(f"{config.out / FOLDER} is not of this script: there is no {MANIFEST}. Give another --out.")
    config.out.mkdir(parents=True, exist_ok=True)
    if not manifest.is_file():
        atomic.write(unfinished, json.dumps(expected, indent=1).encode())
    counts = {}
    for style, archive in sets.items():
        counts[style] = _draw(obtain(archive, config.archives, config.downloads), config.out / FOLDER / style, config)
        print(f"{style}: {counts[style]} pictures", flush=True)
    atomic.write(manifest, json.dumps(expected | {"counts": counts}, indent=1).encode())
    unfinished.unlink(missing_ok=True)
    return counts


def _draw(archive: Path, folder: Path, config: DataConfig) -> int:
    """Write the pictures of one set that are missing; how many it has."""
    icons: dict[str, Any] = read_json(archive, "icons.json")[0]
    names = distinct(icons["icons"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = folder / f"{name}.png"
        if not file.is_file():
            buffer = io.BytesIO()
            draw_icon(icons["icons"][name], icons, config.size).save(buffer, "png")
            atomic.write(file, buffer.getvalue())
    return len(names)


def main() -> None:
    """Run from the command line."""
    try:
        prepare(tyro.cli(DataConfig, description=__doc__))
    except DAVAEError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
