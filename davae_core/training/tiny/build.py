"""Rebuild the tiny models from nothing: data, thirteen trainings, and the files of the pack.

    python -m davae_core.training.tiny.build --size tiny

Every stage saves its state every few minutes; the same command goes on where it was interrupted, and leaves out what
is finished. Each can also be run alone.
"""

import time
from dataclasses import dataclass
from typing import Literal

import tyro

from ... import command, tiny
from ...evaluation.references import PICTURE, save_references
from .. import stages
from ..places import SIZES, folder
from ..run.loop import FINISHED
from . import data, install, more, references
from .captions import load_captions

# By folder: the stage, what follows the size in the recipe's name, and the file that is written last.
TRAININGS = {
    "base_autoencoder": ("base_autoencoder", "", tiny.BASE_AUTOENCODER),
    "base_dit": ("base_dit", "", tiny.TEXT_ENCODER),
    "autoencoder": ("autoencoder", "", tiny.AUTOENCODER),
    "autoencoder_finish": ("autoencoder", "-finish", tiny.AUTOENCODER),
    "autoencoder_sharpen": ("autoencoder", "-sharpen", tiny.AUTOENCODER),
    "autoencoder_robust": ("autoencoder", "-robust", tiny.AUTOENCODER),
    "adapter": ("adapter", "", tiny.ADAPTER),
    "adapter_finish": ("adapter", "-finish", tiny.ADAPTER),
    "autoencoder_redrawn": ("autoencoder", "-redrawn", tiny.AUTOENCODER),
    "few_steps": ("steps", "", tiny.FEW_STEPS),
    "tiny_decoder": ("tiny_decoder", "", tiny.DECODER),
    "predictor": ("predictor", "", tiny.PREDICTOR),
    "predictor_finish": ("predictor", "-finish", tiny.PREDICTOR),
}


@dataclass(frozen=True)
class BuildConfig:
    """What to build."""

    size: Literal["micro", "tiny"] = "tiny"
    """micro: 128 px images from 16 tokens, 10 hours on two CPU cores. tiny: 256 px images from 64 tokens, a night."""
    install: bool = True
    """Replace the weights in davae_core/tiny, and the pictures that recall is measured against, at the end."""


def build(config: BuildConfig) -> int:
    """Run what is not finished; returns the exit code of the first stage that does not finish."""
    images = folder(config.size, "data")
    wanted = data.DataConfig(images, SIZES[config.size])
    data.prepare(wanted, load_captions(), data.ARCHIVES)
    more.prepare(wanted)
    for name, (stage, suffix, last_file) in TRAININGS.items():
        if (folder(config.size, name) / last_file).is_file():
            print(f"{name}: finished before", flush=True)
            continue
        start = time.perf_counter()
        code = stages.run(stage, [config.size + suffix, "--run.resume"])
        print(f"{name}: {'done' if code == FINISHED else 'stopped'} after {clock(start)}", flush=True)
        if code != FINISHED:
            return code
    if config.install:
        install.install(install.InstallConfig(config.size))
        save_references(references.build(images, load_captions()), PICTURE)
    return FINISHED


def clock(start: float) -> str:
    """Time since ``start`` as h:mm:ss."""
    seconds = round(time.perf_counter() - start)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def main(args: list[str] | None = None) -> int:
    """Build from the command line."""
    return build(tyro.cli(BuildConfig, description=__doc__, args=args))


if __name__ == "__main__":
    command.run(main)
