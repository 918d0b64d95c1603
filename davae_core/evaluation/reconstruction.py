"""How well does a DA-VAE reconstruct? ``python -m davae_core.evaluation.reconstruction --images DIR``.

Each image goes through the DA-VAE; through the DA-VAE with detail strength 0; and, at 1/s of the size, through the base
VAE, to be enlarged again by bicubic interpolation. All three are compared with the image.

DIR is a folder with ``held_out/`` in it, whose images are taken, or any folder of images. An image whose sides are no
multiples of what the latent needs is continued by repeating its outermost pixels, equally on both sides; what was added
is cut off again before anything is measured.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from .. import command, devices, images, sizes
from ..davae import DAVAE
from ..errors import DAVAEError
from ..held_out import reconstruction_errors
from ..metrics import resize_bicubic
from ..perceptual import PerceptualDistance, PerceptualName, load_perceptual
from . import figures
from .family import FamilyFiles, hashed, load_davae
from .figures import Bound
from .pictures import Picture, find_pictures, read_batches

METHODS = {"davae": "DA-VAE", "base_bicubic": "base VAE + bicubic", "davae_detail_0": "DA-VAE, detail strength 0"}
METRICS: tuple[PerceptualName, ...] = tuple(
    name for name in get_args(PerceptualName) if name.startswith("st-lpips-")
)  # the ones that work offline
GAIN_DB, ALEX = 2.5, 0.035
SHEET_IMAGES = 16


@torch.no_grad()
def reconstruct(davae: DAVAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each of :data:`METHODS` makes of images ``[B, 3, H, W]`` in [-1, 1]: of the same shape and range.

    Raises:
        DAVAEError: the DA-VAE holds no base decoder.
    """
    height, width = x.shape[2:]
    padded = sizes.pad_to_multiple(x.movedim(1, -1), davae.latent.factor).movedim(-1, 1)
    z = davae.encode(padded)
    base = davae.decode_base(davae.latent.split(z)[0]).clamp(-1, 1)
    made = {
        "davae": davae.decode(z),
        "base_bicubic": resize_bicubic(base, davae.latent.scale),
        "davae_detail_0": davae.decode(z, detail_strength=0.0),
    }
    return {name: sizes.centre(y.movedim(1, -1), height, width).movedim(-1, 1).clamp(-1, 1) for name, y in made.items()}


def compare(
    davae: DAVAE, batches: Iterable[torch.Tensor], metrics: Sequence[PerceptualDistance]
) -> dict[str, dict[str, float]]:
    """Mean PSNR and mean perceptual distances over all images, for each of :data:`METHODS`."""
    return reconstruction_errors(batches, lambda x: reconstruct(davae, x), metrics)


def bounds_of(told: Mapping[str, Mapping[str, float]]) -> list[Bound]:
    """What a reconstruction must reach, for the distances that were measured."""
    davae, base = told["davae"], told["base_bicubic"]
    bounds = [Bound("reconstruction: PSNR above base + bicubic, dB", davae["psnr"] - base["psnr"], at_least=GAIN_DB)]
    if "st-lpips-alex" in davae:
        bounds.append(Bound("reconstruction: st-lpips-alex", davae["st-lpips-alex"], at_most=ALEX))
    return bounds


def available_metrics(device: torch.device) -> tuple[list[PerceptualDistance], list[str]]:
    """The perceptual distances that can be loaded, and for each of the others what to do to have it."""
    found, lacking = [], []
    for name in METRICS:
        try:
            found.append(load_perceptual(name).to(device))
        except DAVAEError as problem:
            lacking.append(str(problem))
    return found, lacking


def sheet(davae: DAVAE, pictures: Sequence[Picture]) -> torch.Tensor:
    """Stacks of image, DA-VAE, base VAE + bicubic, detail strength 0, of the leading images of one size."""
    x = next(read_batches(pictures, SHEET_IMAGES, davae.decoder.conv_out.weight.device))
    return images.contact_sheet([x, *reconstruct(davae, x).values()], SHEET_IMAGES)


def rows(told: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """A line per method, one cell per figure."""
    return [(title, *(f"{value:.4f}" for value in told[name].values())) for name, title in METHODS.items()]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the command line says; everything that goes into the JSON file.

    Raises:
        DAVAEError: weights or images are missing or do not fit.
    """
    start = time.monotonic()
    found = find_pictures(args.images)
    pictures = (found.held_out or found.training)[: args.limit]
    device = devices.device(args.device)
    davae = load_davae(args.autoencoder, device)
    metrics, lacking = available_metrics(device)
    told = compare(davae, progress(read_batches(pictures, args.batch, device), len(pictures)), metrics)
    bounds = bounds_of(told)
    if args.sheet is not None:
        images.save_image(args.sheet, sheet(davae, pictures))
    return {
        "command": "reconstruction",
        "settings": {key: getattr(args, key) for key in ("limit", "batch", "device")},
        "images": len(pictures),
        "reconstruction": told,
        "not_measured": lacking,
        "bounds": [bound.to_json() for bound in bounds],
        "passed": all(bound.passed for bound in bounds),
        "weights": {"autoencoder": hashed(args.autoencoder)},
        "versions": figures.versions(),
        "seconds": time.monotonic() - start,
    }


def progress(batches: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    """The same batches; after each is used it says how far it is."""
    done, start = 0, time.monotonic()
    for x in batches:
        yield x
        done += len(x)
        print(f"reconstructed: {done} of {count}, {time.monotonic() - start:.0f} s", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.evaluation.reconstruction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images")
    out.add_argument(
        "--autoencoder", type=Path, metavar="FILE", default=FamilyFiles().autoencoder, help="DA-VAE (default: tiny)"
    )
    figures.add_common_arguments(out)
    out.add_argument("--sheet", type=Path, metavar="FILE.jpg", help="write a contact sheet to this file")
    out.add_argument("--limit", type=figures.at_least(1), metavar="N", help="reconstruct at most N images")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; what was measured."""
    args = parser().parse_args(argv)
    measured = measure(args)
    told = measured["reconstruction"]
    counted = f"{measured['images']} images"
    print(f"\n{figures.table((counted, *told['davae']), rows(told))}\n")
    print(figures.bounds_table([figures.bound_from_json(bound) for bound in measured["bounds"]]))
    for line in measured["not_measured"]:
        print(f"\nNot measured: {line}")
    print(f"\n{measured['seconds']:.0f} s")
    if args.json is not None:
        figures.write_json(args.json, measured)
    return measured


if __name__ == "__main__":
    command.run(main)
