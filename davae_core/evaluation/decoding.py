"""Is a tiny decoder near the joint decoder, and how fast? ``python -m davae_core.evaluation.decoding --images DIR``.

Each image is encoded, and its latent decoded by both. The two pictures are compared with one another, and each with the
image. Both are timed on latents of square pictures, one picture at a time, in turns; the fastest of several times is
what counts.

DIR is a folder with ``held_out/`` in it, whose images are taken, or any folder of images.
"""

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .. import checkpoints, command, devices, images, sizes, tiny
from ..davae import DAVAE
from ..errors import DAVAEError
from ..metrics import psnr
from ..perceptual import PerceptualDistance
from ..tiny_decoder import TinyDecoder, mismatch
from . import figures
from .family import FamilyFiles, hashed, load_davae
from .figures import Bound
from .pictures import find_pictures, read_batches
from .reconstruction import available_metrics, progress

TIME, ALEX = 0.1, 0.05
TITLES = {
    "tiny_to_joint": "tiny decoder to joint decoder",
    "tiny_to_image": "tiny decoder to image",
    "joint_to_image": "joint decoder to image",
}
SHEET_IMAGES = 16


@torch.no_grad()
def decode(davae: DAVAE, decoder: TinyDecoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the joint decoder and the tiny one make of the latents of images ``[B, 3, H, W]`` in [-1, 1]: the same."""
    height, width = x.shape[2:]
    z = davae.encode(sizes.pad_to_multiple(x.movedim(1, -1), davae.latent.factor).movedim(-1, 1))
    joint, small = (
        sizes.centre(y.movedim(1, -1), height, width).movedim(-1, 1).clamp(-1, 1)
        for y in (davae.decode(z), decoder.decode(z))
    )
    return joint, small


def compare(
    davae: DAVAE, decoder: TinyDecoder, batches: Iterable[torch.Tensor], metrics: Sequence[PerceptualDistance]
) -> dict[str, dict[str, float]]:
    """Mean PSNR and mean perceptual distances over all images, for each of :data:`TITLES`."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in TITLES}
    for x in batches:
        joint, small = decode(davae, decoder, x)
        for name, (one, other) in zip(TITLES, ((small, joint), (small, x), (joint, x)), strict=True):
            told = values[name]
            told.setdefault("psnr", []).extend(psnr(one, other).tolist())
            for metric in metrics:
                told.setdefault(metric.name, []).extend(metric(one, other).tolist())
    return {name: {figure: fmean(some) for figure, some in told.items()} for name, told in values.items()}


@torch.no_grad()
def seconds(davae: DAVAE, decoder: TinyDecoder, side: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of one decode at ``side`` x ``side`` px, the fastest of ``repeats``: ``joint``, ``tiny``, and as ``part``
    the second divided by the first.

    Raises:
        DAVAEError: ``side`` is no multiple of the latent's factor.
    """
    spec = davae.latent
    if side % spec.factor:
        raise DAVAEError(f"the size to time at must be a multiple of {spec.factor} px, got {side}")
    noise = torch.randn(1, spec.channels, side // spec.factor, side // spec.factor).to(device)
    z = spec.denormalise(noise)
    taken: dict[str, list[float]] = {"joint": [], "tiny": []}
    for _ in range(repeats + 1):  # the first is not counted
        taken["joint"].append(figures.seconds(lambda: davae.decode(z), device))
        taken["tiny"].append(figures.seconds(lambda: decoder.decode(z), device))
    joint, small = (min(times[1:]) for times in taken.values())
    return {"joint": joint, "tiny": small, "part": small / joint}


def bounds_of(told: Mapping[str, Mapping[str, float]], times: Mapping[str, Mapping[str, float]]) -> list[Bound]:
    """What a tiny decoder must reach, for the sizes and distances that were measured."""
    bounds = [Bound(f"time at {side} px / the joint decoder's", t["part"], at_most=TIME) for side, t in times.items()]
    if "st-lpips-alex" in told["tiny_to_joint"]:
        bounds.append(Bound("st-lpips-alex between the two", told["tiny_to_joint"]["st-lpips-alex"], at_most=ALEX))
    return bounds


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
    decoder = checkpoints.load_tiny_decoder(args.decoder, torch.float32).to(device)
    if words := mismatch(decoder.latent, davae.latent):
        raise DAVAEError(f"{args.decoder.name} {words}: {args.autoencoder.name}. Give the DA-VAE it was trained for")
    times = {str(side): seconds(davae, decoder, side, args.repeats, device) for side in args.sides}
    metrics, lacking = available_metrics(device)
    told = compare(davae, decoder, progress(read_batches(pictures, args.batch, device), len(pictures)), metrics)
    bounds = bounds_of(told, times)
    if args.sheet is not None:
        x = next(read_batches(pictures, SHEET_IMAGES, device))
        images.save_image(args.sheet, images.contact_sheet([x, *decode(davae, decoder, x)], SHEET_IMAGES))
    return {
        "command": "decoding",
        "settings": {key: getattr(args, key) for key in ("limit", "batch", "device", "repeats")},
        "images": len(pictures),
        "decoding": told,
        "seconds_of_a_decode": times,
        "threads": torch.get_num_threads(),
        "not_measured": lacking,
        "bounds": [bound.to_json() for bound in bounds],
        "passed": all(bound.passed for bound in bounds),
        "weights": {"autoencoder": hashed(args.autoencoder), "decoder": hashed(args.decoder)},
        "versions": figures.versions(),
        "seconds": time.monotonic() - start,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.evaluation.decoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images")
    out.add_argument(
        "--autoencoder", type=Path, metavar="FILE", default=FamilyFiles().autoencoder, help="DA-VAE (default: tiny)"
    )
    shipped = tiny.FOLDERS["vae_approx"] / tiny.DECODER
    out.add_argument("--decoder", type=Path, metavar="FILE", default=shipped, help="tiny decoder (default: tiny)")
    figures.add_common_arguments(out)
    out.add_argument("--sheet", type=Path, metavar="FILE.jpg", help="write images and both decodes to this file")
    out.add_argument("--limit", type=figures.at_least(1), metavar="N", help="decode at most N images")
    out.add_argument(
        "--sides", type=figures.at_least(1), nargs="+", default=[128, 512], metavar="PX", help="sizes to time at"
    )
    out.add_argument("--repeats", type=figures.at_least(1), default=40, metavar="N", help="decodes to take times of")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; what was measured."""
    args = parser().parse_args(argv)
    measured = measure(args)
    told, times = measured["decoding"], measured["seconds_of_a_decode"]
    rows = [(title, *(f"{value:.4f}" for value in told[name].values())) for name, title in TITLES.items()]
    counted = f"{measured['images']} images"
    print(f"\n{figures.table((counted, *told['tiny_to_joint']), rows)}\n")
    timed = [(f"{side} px", *(f"{t[key]:.4f}" for key in ("joint", "tiny", "part"))) for side, t in times.items()]
    print(f"{figures.table(('seconds of a decode', 'joint', 'tiny', 'tiny / joint'), timed)}\n")
    print(figures.bounds_table([figures.bound_from_json(bound) for bound in measured["bounds"]]))
    for line in measured["not_measured"]:
        print(f"\nNot measured: {line}")
    print(f"\n{measured['seconds']:.0f} s")
    if args.json is not None:
        figures.write_json(args.json, measured)
    return measured


if __name__ == "__main__":
    command.run(main)
