"""Rebuild the tiny models from nothing: data, six trainings, and the files of the pack.

    python -m davae_core.training.tiny.build --size tiny

Every stage saves its state every few minutes; the same command goes on where it was interrupted, and leaves out what
is finished. A stage can also be run alone, by its own script.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import tyro

from ... import tiny
from ...evaluation.references import PICTURE, save_references
from .. import adapter, autoencoder, base_autoencoder, base_dit, loop, script
from . import data, install, recipes, references
from .captions import load_captions

Stage = Callable[[list[str]], int]

# By folder: the script, what follows the size in the recipe's name, and the file that is written last.
TRAININGS: dict[str, tuple[Stage, str, str]] = {
    "base_autoencoder": (base_autoencoder.main, "", base_autoencoder.FILE),
    "base_dit": (base_dit.main, "", tiny.TEXT_ENCODER),
    "autoencoder": (autoencoder.main, "", tiny.AUTOENCODER),
    "autoencoder_finish": (autoencoder.main, "-finish", tiny.AUTOENCODER),
    "autoencoder_sharpen": (autoencoder.main, "-sharpen", tiny.AUTOENCODER),
    "adapter": (adapter.main, "", tiny.ADAPTER),
}


@dataclass(frozen=True)
class BuildConfig:
    """What to build."""

    size: Literal["micro", "tiny"] = "tiny"
    """micro: 128 px images from 16 tokens, 5.5 hours on two CPU cores. tiny: 256 px images from 64 tokens, a night."""
    install: bool = True
    """Replace the weights in davae_core/tiny, and the pictures that recall is measured against, at the end."""


def build(config: BuildConfig) -> int:
    """Run what is not finished; returns the exit code of the first stage that does not finish."""
    images = recipes.folder(config.size, "data")
    data.prepare(data.DataConfig(out=images, size=recipes.SIZES[config.size]), load_captions(), data.ARCHIVES)
    for name, (train, suffix, last_file) in TRAININGS.items():
        if (recipes.folder(config.size, name) / last_file).is_file():
            print(f"{name}: finished before", flush=True)
            continue
        start = time.perf_counter()
        code = train([config.size + suffix, "--run.resume"])
        print(f"{name}: {'done' if code == loop.FINISHED else 'stopped'} after {clock(start)}", flush=True)
        if code != loop.FINISHED:
            return code
    if config.install:
        install.install(install.InstallConfig(config.size))
        save_references(references.build(images, load_captions()), PICTURE)
    return loop.FINISHED


def clock(start: float) -> str:
    """Time since ``start`` as h:mm:ss."""
    seconds = round(time.perf_counter() - start)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def main(args: list[str] | None = None) -> int:
    """Build from the command line."""
    return build(tyro.cli(BuildConfig, description=__doc__, args=args))


if __name__ == "__main__":
    script.main(main)
