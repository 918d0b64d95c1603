"""Which settings draw better? Variants of the method, trained alike from the same start and measured by what they draw.

    python -m davae_core.training ablate                       # everything, three seeds: a night on two cores
    python -m davae_core.training ablate adapter decoder/noise-0.5
    python -m davae_core.training ablate --table               # what is finished so far

Every variant runs once with each seed. A finished one leaves OUT/group/name/SEED.json and is not run again; what was
interrupted goes on where it was. Started in two terminals, two share the work. The table is written after each run:
OUT/table.md for people, OUT/table.json with everything. Runs with other steps, batches, pictures, captions or files
cannot be compared with those that are there, and are refused: they belong into another folder (--out).
"""

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from ...evaluation import figures
from ...evaluation.family import FamilyFiles, hashed
from ...lock import holding
from ..run.recorded import to_json
from . import comparable, table, trainings
from .budget import BenchConfig, Steps
from .measure import Figures, Pictures, drawings, reconstructions
from .trainings import Stopped
from .variants import Variant, chosen

STOPPED = 130
QUICK = ("adapter/base-ahead", "latent/no-alignment", "decoder/noise-0.5", "sampling/cfg-1.5")

logger = logging.getLogger(__name__)


def bench(config: BenchConfig) -> int:
    """Run what is not finished; the exit code."""
    variants = chosen(config.variants or (QUICK if config.quick else ()))
    if config.quick:
        config = quick(config)
    if not config.table:
        told = comparable.settings(config)
        comparable.check(config.out, variants, told)
        config.out.mkdir(parents=True, exist_ok=True)
        if any(variant.group == "adapter" for variant in variants):
            _alone(config, partial(trainings.prepare, config, variants, told))
        pictures = Pictures.read(config.images, told["size"], config.captions, config.held_out)
        for seed in config.seeds:  # a seed of everything first, so that there is soon a whole table
            for variant in variants:
                try:
                    _run(config, variant, seed, pictures, told)
                except Stopped:
                    return STOPPED
                table.write(config.out, variants)
    print(table.write(config.out, variants))
    for line in comparable.mixed(config.out, variants):
        print(f"warning: {line}")
    return 0


def quick(config: BenchConfig) -> BenchConfig:
    """The same with almost nothing to do."""
    return BenchConfig(
        **vars(config)
        | {"seeds": config.seeds[:1], "steps": Steps(2, 2, 2), "batch": 2, "latent_batch": 1, "checkpoints": 1}
        | {"captions": 2, "held_out": 1}
    )


def _alone(config: BenchConfig, do: Callable[[], None]) -> None:
    """Do something that a second bench in the folder must not do at once; it waits."""
    while True:
        with holding(config.out / ".lock") as free:
            if free:
                do()
                return
        print("another process prepares the latents; waiting", flush=True)
        time.sleep(4)


def _run(config: BenchConfig, variant: Variant, seed: int, pictures: Pictures, settings: comparable.Settings) -> None:
    """Train and measure one variant with one seed, unless that is done or another process is at it.

    Raises:
        DAVAEError: another process has begun or finished it with other settings.
    """
    comparable.check(config.out, [variant], settings)
    result = table.result(config.out, variant, seed)
    folder = result.parent / f"run_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with holding(folder / ".ablation") as free:
        if not free:
            print(f"{variant.key}, seed {seed}: another process is at it", flush=True)
            return
        if not result.is_file():
            print(f"{variant.key}, seed {seed}", flush=True)
            made = {comparable.KEY: comparable.mattering(settings, variant)}
            figures.write_json(folder / comparable.BEGUN, made[comparable.KEY])
            start = time.monotonic()
            told = _measured(config, variant, seed, pictures, folder)
            told |= {"variant": variant.key, "seed": seed, "about": variant.about, "seconds": time.monotonic() - start}
            told |= {"changes": {kind: dict(vars(variant)[kind]) for kind in ("autoencoder", "adapter", "sampling")}}
            figures.write_json(result, told | made | {"bench": to_json(config), "versions": figures.versions()})
    with suppress(OSError):
        shutil.rmtree(folder)


def _measured(config: BenchConfig, variant: Variant, seed: int, pictures: Pictures, out: Path) -> dict[str, Any]:
    """The curve of a variant, and what stage 1 reconstructs where it is trained."""
    autoencoder, adapter = trainings.given(config, variant), config.adapter
    told: Figures = {}
    points = [trainings.Checkpoint(0, adapter)]
    if variant.group in ("latent", "decoder"):
        autoencoder = trainings.stage_1(config, variant, seed, out / "autoencoder")[-1].path
        told = reconstructions(autoencoder, pictures)
    if variant.group in ("latent", "adapter"):
        points = trainings.stage_2(config, variant, seed, out / "adapter", autoencoder)
    curve = []
    for point in points:
        files = FamilyFiles(config.model, autoencoder, point.path, config.text_encoder)
        values = drawings(files, pictures, seed, variant.sampling) | told
        curve.append({"step": point.step, **values})
        print(f"{variant.key}, seed {seed}, step {point.step}: {table.line(values)}", flush=True)
    weights = {"model": config.model, "autoencoder": autoencoder, "adapter": points[-1].path}
    return {"curve": curve, "figures": curve[-1], "weights": {role: hashed(path) for role, path in weights.items()}}


def main(args: list[str] | None = None) -> int:
    """The bench from the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return bench(tyro.cli(BenchConfig, description=__doc__, args=args, prog="python -m davae_core.training ablate"))
