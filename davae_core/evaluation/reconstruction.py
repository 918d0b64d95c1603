"""Is the detail real, and does the base survive? ``python -m davae_core.evaluation.reconstruction --images DIR``.

Reconstruction: each image goes through the DA-VAE; through the DA-VAE with detail strength 0; and, at 1/s of the size,
through the base VAE, to be enlarged again by bicubic interpolation. All three are compared with the image.

Generation: training captions are drawn by the adapted and by the base model. The energy above half the Nyquist
frequency is compared with that of the training images of the same captions, the base model's samples enlarged by
bicubic interpolation; and the base channels, decoded by the base decoder, with the DA-VAE's own output made smaller.

DIR is a folder written by davae_core.training.tiny.data, whose held_out/ is reconstructed and whose train/ gives the
training images; or any folder of images, which are reconstructed, and nothing is generated. An image whose sides are
no multiples of what the latent needs is continued by repeating its outermost pixels, equally on both sides; what was
added is cut off again before anything is measured.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from .. import command, images, sizes, tiny
from ..davae import DAVAE
from ..errors import DAVAEError
from ..perceptual import PerceptualDistance, PerceptualName, load_perceptual
from ..sampling import Sampling
from . import figures, generate
from .family import FILES, Family, find_files, hashes, load_davae, load_family
from .figures import Bound
from .generate import Prompt
from .metrics import high_frequency_energy, psnr, resize_bicubic
from .references import References, load_references

METHODS = {"davae": "DA-VAE", "base_bicubic": "base VAE + bicubic", "davae_detail_0": "DA-VAE, detail strength 0"}
METRICS: tuple[PerceptualName, ...] = tuple(
    name for name in get_args(PerceptualName) if name.startswith("st-lpips-")
)  # the ones that work offline
GAIN_DB, SURVIVES_DB = 2.0, 20.0
ADAPTED_RATIO, BASE_RATIO = (0.5, 2.0), 0.3
SHEET_IMAGES = 16


@dataclass(frozen=True)
class Source:
    """What there is to measure on.

    Attributes:
        held_out: images to reconstruct.
        training: image of each training caption; empty for a folder that was not prepared.
    """

    held_out: list[Path]
    training: dict[str, Path]


def find_source(folder: Path) -> Source:
    """Look into a folder: prepared data has ``held_out/`` and ``train/``, with a ``.txt`` beside each image.

    Raises:
        DAVAEError: it is no folder or holds no images.
    """
    prepared = (folder / "held_out").is_dir()
    held_out = images.find_images(folder / "held_out" if prepared else folder)
    training = {}
    if prepared and (folder / "train").is_dir():
        for path in images.find_images(folder / "train"):
            text = path.with_suffix(".txt")
            if text.is_file():
                training[text.read_text(encoding="utf-8").strip()] = path
    return Source(held_out, training)


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
    totals: dict[str, dict[str, list[float]]] = {name: {} for name in METHODS}
    for x in batches:
        for name, y in reconstruct(davae, x).items():
            measured = [("psnr", psnr(y, x)), *((metric.name, metric(y, x)) for metric in metrics)]
            for key, values in measured:
                totals[name].setdefault(key, []).extend(values.tolist())
    return {name: {key: _mean(values) for key, values in told.items()} for name, told in totals.items()}


def read_batches(paths: Sequence[Path], size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images ``[B, 3, H, W]``, at most ``size`` at a time; neighbours of one size go together."""
    waiting: list[torch.Tensor] = []
    for path in paths:
        image = images.read_image(path)
        if waiting and (len(waiting) == size or waiting[0].shape != image.shape):
            yield torch.stack(waiting).to(device)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting).to(device)


@dataclass(frozen=True)
class Generated:
    """What the models draw for the same captions, ``[N, 3, ., .]`` in [-1, 1] on the CPU.

    Attributes:
        adapted: at full size.
        survived: the base channels of the same latents, decoded by the base decoder, at 1/s.
        base: the base model's own samples, at 1/s.
    """

    adapted: torch.Tensor
    survived: torch.Tensor
    base: torch.Tensor


@torch.no_grad()
def draw(
    family: Family, prompts: Sequence[Prompt], seed: int, adapted: Sampling, base: Sampling, batch: int
) -> Generated:
    """Draw the captions with both models; says how far it is."""
    parts: list[list[torch.Tensor]] = [[], [], []]
    start = time.monotonic()
    for some in generate.batches(prompts, batch):
        z = generate.adapted_latents(family, some, seed, adapted)
        z_base = family.latent.split(z)[0]
        made = (
            family.davae.decode(z),
            family.davae.decode_base(z_base),
            generate.base_images(family, some, seed, base),
        )
        for part, y in zip(parts, made, strict=True):
            part.append(y.clamp(-1, 1).cpu())
        print(f"drawn: {sum(map(len, parts[0]))} of {len(prompts)}, {time.monotonic() - start:.0f} s", flush=True)
    return Generated(*(torch.cat(part) for part in parts))


def spectrum(drawn: Generated, training: torch.Tensor) -> dict[str, float]:
    """Mean energy above half the Nyquist frequency, and the ratios to that of the training images ``[N, 3, H, W]``.

    Raises:
        DAVAEError: the training images have another size than the drawn ones.
    """
    if training.shape[2:] != drawn.adapted.shape[2:]:
        raise DAVAEError(
            f"the training images are {training.shape[3]} x {training.shape[2]} px, the model draws "
            f"{drawn.adapted.shape[3]} x {drawn.adapted.shape[2]}; prepare the data at that size"
        )
    enlarged = resize_bicubic(drawn.base, training.shape[2] / drawn.base.shape[2])
    energy = {
        name: high_frequency_energy(x).mean().item()
        for name, x in (("training", training), ("adapted", drawn.adapted), ("base_bicubic", enlarged))
    }
    ratios = {f"{name}_ratio": _ratio(energy[name], energy["training"]) for name in ("adapted", "base_bicubic")}
    return {**energy, **ratios}


def survival(davae: DAVAE, drawn: Generated) -> dict[str, float]:
    """PSNR of the base channels' picture against the DA-VAE's output at 1/s: mean over the images, and the lowest."""
    values = psnr(drawn.survived, davae.shrink(drawn.adapted))
    return {"psnr": values.mean().item(), "lowest_psnr": values.min().item()}


def choose(references: References, training: Mapping[str, Path], count: int) -> list[Prompt]:
    """So many training captions, evenly spread, of those that have an image.

    Raises:
        DAVAEError: none has.
    """
    there = [i for i in references.training if references.captions[i] in training]
    if not there:
        raise DAVAEError("no image in train/ has a caption (in a .txt beside it) that the references know")
    some = [there[i * len(there) // count] for i in range(count)] if count < len(there) else there
    return [Prompt(i, references.captions[i]) for i in some]


def bounds_of(measured: Mapping[str, Any]) -> list[Bound]:
    """The bounds of what was measured; a perceptual bound is on the difference DA-VAE minus base."""
    told = measured["reconstruction"]
    davae, base = told["davae"], told["base_bicubic"]
    bounds = [Bound("PSNR of DA-VAE above base + bicubic, dB", davae["psnr"] - base["psnr"], at_least=GAIN_DB)]
    for key in davae:
        if key != "psnr":
            bounds.append(Bound(f"{key} of DA-VAE minus base + bicubic", davae[key] - base[key], below=0.0))
    if generated := measured["generation"]:
        energy, survived = generated["high_frequency"], generated["base_survives"]
        low, high = ADAPTED_RATIO
        bounds += [
            Bound("high frequencies, adapted / training", energy["adapted_ratio"], at_least=low, at_most=high),
            Bound("high frequencies, base + bicubic / training", energy["base_bicubic_ratio"], at_most=BASE_RATIO),
            Bound("PSNR of base channels with DA-VAE output, dB", survived["psnr"], at_least=SURVIVES_DB),
        ]
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


def sheet(davae: DAVAE, source: Sequence[Path], drawn: Generated | None) -> torch.Tensor:
    """Stacks of images.

    Above: image, DA-VAE, base VAE + bicubic, detail strength 0, of the leading images of one size. Below, where
    something was drawn: adapted model, its base channels alone, base model.
    """
    x = next(read_batches(source, SHEET_IMAGES, davae.decoder.conv_out.weight.device))
    top = images.contact_sheet([x, *reconstruct(davae, x).values()], SHEET_IMAGES)
    if drawn is None:
        return top
    rows = [images_[:SHEET_IMAGES] for images_ in (drawn.adapted, drawn.survived, drawn.base)]
    bottom = images.contact_sheet(rows, SHEET_IMAGES)
    width = max(top.shape[2], bottom.shape[2])
    filled = [
        torch.cat([part, part.new_ones(3, part.shape[1], width - part.shape[2])], dim=2) for part in (top, bottom)
    ]
    return torch.cat(filled, dim=1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the command line says; everything that goes into the JSON file.

    Raises:
        DAVAEError: weights or images are missing or do not fit.
    """
    start = time.monotonic()
    source = find_source(args.images)
    device = figures.device(args.device)
    generates = bool(source.training and args.captions)
    paths = find_files(args.folder, tuple(FILES) if generates else (tiny.AUTOENCODER,))
    family = load_family(args.folder, device) if generates else None
    davae = family.davae if family else load_davae(paths[tiny.AUTOENCODER], device)
    metrics, lacking = available_metrics(device)
    held_out = source.held_out[: args.limit]
    measured: dict[str, Any] = {
        "command": "reconstruction",
        "settings": {key: getattr(args, key) for key in ("limit", "captions", "steps", "seed", "batch", "device")},
        "images": len(held_out),
        "reconstruction": compare(davae, _told(read_batches(held_out, args.batch, device), len(held_out)), metrics),
        "generation": None,
        "not_measured": lacking,
    }
    drawn = None
    if family is None:
        measured["not_measured"].append(
            "generated images: " + ("--captions is 0" if source.training else f"{args.images} has no captioned train/")
        )
    else:
        prompts = choose(load_references(), source.training, args.captions)
        samplings = {"adapted": generate.adapted_sampling(family, args.steps), "base": Sampling(steps=args.steps)}
        drawn = draw(family, prompts, args.seed, samplings["adapted"], samplings["base"], args.batch)
        training = _stack([source.training[prompt.caption] for prompt in prompts])
        measured["generation"] = {
            "count": len(prompts),
            "sampling": {name: asdict(sampling) for name, sampling in samplings.items()},
            "high_frequency": spectrum(drawn, training),
            "base_survives": survival(davae, drawn),
        }
    if args.sheet is not None:
        images.save_image(args.sheet, sheet(davae, held_out, drawn))
    bounds = bounds_of(measured)
    return {
        **measured,
        "bounds": [bound.to_json() for bound in bounds],
        "passed": all(bound.passed for bound in bounds),
        "weights": hashes(paths),
        "versions": figures.versions(),
        "seconds": time.monotonic() - start,
    }


def _told(batches: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    """The same batches; after each is used it says how far it is."""
    done, start = 0, time.monotonic()
    for x in batches:
        yield x
        done += len(x)
        print(f"reconstructed: {done} of {count}, {time.monotonic() - start:.0f} s", flush=True)


def _stack(paths: Sequence[Path]) -> torch.Tensor:
    """Images of one size as ``[N, 3, H, W]``."""
    read = [images.read_image(path) for path in paths]
    for path, image in zip(paths, read, strict=True):
        if image.shape != read[0].shape:
            raise DAVAEError(f"{path} has another size than {paths[0]}; training images must have one size")
    return torch.stack(read)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.evaluation.reconstruction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--images", type=Path, required=True, metavar="DIR", help="prepared data, or any images")
    figures.add_common_arguments(out)
    out.add_argument("--limit", type=figures.at_least(1), metavar="N", help="reconstruct at most N images")
    out.add_argument("--captions", type=figures.at_least(0), default=100, metavar="N", help="to draw (default: 100)")
    out.add_argument("--steps", type=figures.at_least(1), default=30, help="of the sampler (default: 30)")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; what was measured."""
    args = parser().parse_args(argv)
    measured = measure(args)
    told = measured["reconstruction"]
    keys = list(told["davae"])
    counted = f"{measured['images']} images"
    rows = [(title, *(f"{told[name][key]:.4f}" for key in keys)) for name, title in METHODS.items()]
    print(f"\n{figures.table((counted, *keys), rows)}\n")
    print(figures.bounds_table([figures.bound_from_json(bound) for bound in measured["bounds"]]))
    for line in measured["not_measured"]:
        print(f"\nNot measured: {line}")
    print(f"\n{measured['seconds']:.0f} s")
    if args.json is not None:
        figures.write_json(args.json, measured)
    return measured


if __name__ == "__main__":
    command.run(main)
