"""What is a predicted detail worth? ``python -m davae_core.evaluation.predicting --images DIR``.

Held-out pictures are encoded; their base latent alone is decoded at full size, with the detail that the predictor says,
and beside it with none, with the true one, and by the base VAE with bicubic enlargement. All are compared with the
pictures. The time of a prediction is that of one picture, over the time of its decoding.

With --captions, captions that the base model knows are drawn by it, and decoded with predicted detail: what is nearest
to each (recall) and how far it is from its own picture, beside the base model's and the adapted model's drawings. With
--denoise, the adapted model then paints over the base model's latent, with predicted detail and with none. With --again
the adapted model's drawing is encoded by the base VAE and decoded at twice its size: with predicted detail, with none,
and enlarged. DIR has to hold pictures of that size then.

DIR holds ``train/`` and ``held_out/``, as davae_core.training.tiny.data writes them, or any images.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints, command, devices, images, tiny
from ..davae import DAVAE
from ..errors import DAVAEError
from ..held_out import reconstruction_errors
from ..latent import with_zero_detail
from ..metrics import resize_bicubic
from ..perceptual import PerceptualDistance
from ..predictor import DetailPredictor, require_same_latent
from ..sampling import Sampling
from . import drawn, figures, generate, recall
from . import family as families
from .drawing import asked_of
from .drawn import Asked
from .family import Family, hashed, load_family
from .figures import Bound
from .pictures import find_pictures, read_batches, references_of
from .reconstruction import available_metrics, progress, reconstruct
from .references import References

METHODS = {
    "base_bicubic": "base VAE + bicubic",
    "davae_detail_0": "no detail",
    "predicted": "predicted detail",
    "davae": "true detail",
}
GAIN_DB, ALEX, TIME = 1.8, 0.042, 0.05
SHEET_IMAGES, COLUMNS, TURNS = 24, 12, 9

Predict = Callable[[torch.Tensor], torch.Tensor]


def completed(davae: DAVAE, predictor: DetailPredictor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each of :data:`METHODS` makes of images ``[B, 3, H, W]`` in [-1, 1]; both sides multiples of the factor."""
    made = reconstruct(davae, x)
    made["predicted"] = davae.decode(predictor.complete(davae.encode_base(x))).clamp(-1, 1)
    return {name: made[name] for name in METHODS}


@torch.no_grad()
def time_share(davae: DAVAE, predictor: DetailPredictor, z_base: torch.Tensor, turns: int = TURNS) -> float:
    """Time of a prediction over that of the decoding after it, for ``z_base [1, C, h, w]``: the median of so many
    turns, both in each."""
    z, device = predictor.complete(z_base), z_base.device
    davae.decode(z)
    shares = [
        figures.seconds(lambda: predictor.complete(z_base), device) / figures.seconds(lambda: davae.decode(z), device)
        for _ in range(turns)
    ]
    return statistics.median(shares)


def ways_of(family: Family, predictor: DetailPredictor) -> dict[str, Predict]:
    """From the base model's latents ``[B, C, h, w]`` to images of the full size, by the ways that need no adapter."""
    davae = family.davae
    return {
        "base_bicubic": lambda z: resize_bicubic(davae.decode_base(z).clamp(-1, 1), davae.latent.scale),
        "davae_detail_0": lambda z: davae.decode(with_zero_detail(z, davae.latent), 0.0),
        "predicted": lambda z: davae.decode(predictor.complete(z)),
    }


@torch.no_grad()
def measure_drawn(
    family: Family,
    predictor: DetailPredictor,
    asked: Sequence[Asked],
    metrics: Sequence[PerceptualDistance],
    references: References,
    args: argparse.Namespace,
) -> tuple[dict[str, dict[str, Any]], list[torch.Tensor]]:
    """Drawings of the base model by each way, and of the adapted model, against the captions' own pictures: figures as
    of ``evaluation.drawing``, and recall. And the first drawings of each, for a sheet."""
    how = Sampling(steps=args.steps or Sampling.steps)
    ways = ways_of(family, predictor)
    lists: dict[str, drawn.Lists] = {}
    verdicts: dict[str, list[recall.Verdict]] = {}
    rows: dict[str, list[torch.Tensor]] = {}
    for some, x in drawn.batches(asked, args.batch, generate.image_size(family), family, "drawn"):
        prompts = [one.prompt for one in some]
        z = generate.base_latents(family, prompts, args.seed, how)
        made = {name: way(z).clamp(-1, 1) for name, way in ways.items()}
        adapted = generate.adapted_sampling(family, args.steps)
        made["adapted"] = generate.adapted_images(family, prompts, args.seed, adapted)
        for name, y in made.items():
            kept = lists.setdefault(name, {})
            for figure, values in drawn.against(y, x, metrics).items():
                kept.setdefault(figure, []).extend(values)
            judged = recall.judge(y, [prompt.caption for prompt in prompts], references)
            verdicts.setdefault(name, []).extend(judged)
            rows.setdefault(name, []).append(y.cpu())
        rows.setdefault("true", []).append(x.cpu())
    told = {name: drawn.means(kept) | recall.summary(verdicts[name], references) for name, kept in lists.items()}
    for judged_too in told.values():
        judged_too.pop("mistakes")
    return told, [torch.cat(rows[name])[:SHEET_IMAGES] for name in ("true", *ways, "adapted")]


@torch.no_grad()
def measure_denoise(
    family: Family,
    predictor: DetailPredictor,
    asked: Sequence[Asked],
    metrics: Sequence[PerceptualDistance],
    args: argparse.Namespace,
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of the adapted model's painting over base latents, by how the detail began and by denoise."""
    how, base = generate.adapted_sampling(family, args.steps), Sampling(steps=args.steps or Sampling.steps)
    begun: dict[str, Predict] = {
        "davae_detail_0": lambda z: with_zero_detail(z, family.latent),
        "predicted": predictor.complete,
    }
    lists: dict[tuple[str, float], drawn.Lists] = {}
    for some, x in drawn.batches(asked, args.batch, generate.image_size(family), family, "painted over"):
        prompts = [one.prompt for one in some]
        z = generate.base_latents(family, prompts, args.seed, base)
        for name, begin in begun.items():
            for denoise in args.denoise:
                over = generate.painted_over(family, prompts, begin(z), args.seed + 1, how, denoise)
                kept = lists.setdefault((name, denoise), {})
                for figure, values in drawn.against(family.davae.decode(over).clamp(-1, 1), x, metrics).items():
                    kept.setdefault(figure, []).extend(values)
    return {name: {f"{d:g}": drawn.means(lists[name, d]) for d in args.denoise} for name in begun}


@torch.no_grad()
def measure_again(
    family: Family,
    predictor: DetailPredictor,
    asked: Sequence[Asked],
    metrics: Sequence[PerceptualDistance],
    args: argparse.Namespace,
) -> tuple[dict[str, dict[str, float]], list[torch.Tensor]]:
    """Figures of the adapted model's drawings at s times their size against the captions' own pictures, as of
    ``evaluation.drawing``; and the first of each way, after the pictures.

    Raises:
        DAVAEError: a picture is smaller than that.
    """
    davae, spec = family.davae, family.latent
    side = spec.scale * generate.image_size(family)
    for one in asked:
        short = min(images.read_image(one.picture.path).shape[1:])
        if short < side:
            raise DAVAEError(
                f"{one.picture.path} is {short} px, expected at least {side}, the size of --again: give a folder "
                "with larger pictures, or leave it out"
            )
    ways: dict[str, Predict] = {
        "enlarged": lambda small: resize_bicubic(small, spec.scale),
        "davae_detail_0": lambda small: davae.decode(with_zero_detail(davae.encode_small(small), spec), 0.0),
        "predicted": lambda small: davae.decode(predictor.complete(davae.encode_small(small))),
    }
    how = generate.adapted_sampling(family, args.steps)
    lists: dict[str, drawn.Lists] = {name: {} for name in ways}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("true", *ways)}
    for some, x in drawn.batches(asked, args.batch, side, family, "drawn again"):
        small = generate.adapted_images(family, [one.prompt for one in some], args.seed, how)
        rows["true"].append(x.cpu())
        for name, way in ways.items():
            y = way(small).clamp(-1, 1)
            for figure, values in drawn.against(y, x, metrics).items():
                lists[name].setdefault(figure, []).extend(values)
            rows[name].append(y.cpu())
    told = {name: drawn.means(kept) for name, kept in lists.items()}
    return told, [torch.cat(row)[:SHEET_IMAGES] for row in rows.values()]


def bounds_of(held_out: Mapping[str, Mapping[str, float]], share: float) -> list[Bound]:
    """What a prediction should reach, for the distances that were measured."""
    predicted, base = held_out["predicted"], held_out["base_bicubic"]
    bounds = [Bound("predicted: PSNR above base + bicubic, dB", predicted["psnr"] - base["psnr"], at_least=GAIN_DB)]
    if "st-lpips-alex" in predicted:
        bounds.append(Bound("predicted: st-lpips-alex", predicted["st-lpips-alex"], at_most=ALEX))
    return [*bounds, Bound("time of a prediction / of a decoding", share, at_most=TIME)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the command line says; everything that goes into the JSON file.

    Raises:
        DAVAEError: weights or images are missing or do not fit.
    """
    start = time.monotonic()
    found = find_pictures(args.images)
    some = (found.held_out or found.training)[: args.limit]
    device = devices.device(args.device)
    where = families.files_of(args)
    predictor = checkpoints.load_predictor(args.predictor, torch.float32).requires_grad_(False).to(device)
    davae = families.load_davae(where.autoencoder, device)
    if davae.predictor is not None:
        raise DAVAEError(
            f"{where.autoencoder.name} has a predictor inside and would add to what {args.predictor.name} predicts; "
            "give the DA-VAE it was made from"
        )
    require_same_latent(predictor.latent, davae.latent, args.predictor.name, where.autoencoder.name)
    metrics, lacking = available_metrics(device)
    batches = progress(read_batches(some, args.batch, device), len(some))
    held_out = reconstruction_errors(batches, lambda x: completed(davae, predictor, x), metrics)
    x = next(read_batches(some, SHEET_IMAGES, device))
    share = time_share(davae, predictor, davae.encode_base(x[:1]))
    sheets = {"held_out": [x, *completed(davae, predictor, x).values()]}
    told: dict[str, Any] = {"held_out": held_out, "time_share": share}
    if args.captions or args.unknown:
        family, references = load_family(where, device), references_of(found)
        known = asked_of(found.training, args.captions, references) if args.captions else []
        asked = known + (asked_of(found.held_out, args.unknown, references, held_out=True) if args.unknown else [])
        told["drawn"], sheets["drawn"] = measure_drawn(family, predictor, asked, metrics, references, args)
        if args.denoise and known:
            told["denoise"] = measure_denoise(family, predictor, known, metrics, args)
        if args.again and known:
            told["again"], sheets["again"] = measure_again(family, predictor, known, metrics, args)
    if args.sheet is not None:
        for name, rows in sheets.items():
            path = args.sheet.with_name(f"{args.sheet.stem}-{name}{args.sheet.suffix}")
            images.save_image(path, images.contact_sheet(rows, COLUMNS))
    bounds = bounds_of(held_out, share)
    return {
        "command": "predicting",
        "settings": {
            key: getattr(args, key) for key in ("limit", "captions", "unknown", "denoise", "again", "seed", "device")
        },
        "images": len(some),
        **told,
        "not_measured": lacking,
        "bounds": [bound.to_json() for bound in bounds],
        "passed": all(bound.passed for bound in bounds),
        "weights": {**where.hashes(), "predictor": hashed(args.predictor)},
        "versions": figures.versions(),
        "seconds": time.monotonic() - start,
    }


def tables(measured: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
    """Title, head and rows of each table."""
    held_out = measured["held_out"]
    rows = [(METHODS[name], *(f"{value:.4f}" for value in held_out[name].values())) for name in METHODS]
    yield f"{measured['images']} held-out pictures", ("", *held_out["davae"]), rows
    if "drawn" in measured:
        keys = [key for key, value in measured["drawn"]["predicted"].items() if not isinstance(value, Mapping)]
        rows = []
        for name, told in measured["drawn"].items():
            recalled = (told["training"]["top1"], told["held_out"]["name"])
            values = (*(told[key] for key in keys), *recalled)
            rows.append((METHODS.get(name, f"{name} model"), *(f"{value:.4f}" for value in values)))
        yield "drawn", ("", *keys, "known top-1", "unknown name right"), rows
    if "denoise" in measured:
        rows = [
            (f"{METHODS[name]}, {denoise}", *(f"{value:.4f}" for value in told.values()))
            for name, some in measured["denoise"].items()
            for denoise, told in some.items()
        ]
        first = next(iter(next(iter(measured["denoise"].values())).values()))
        yield "painted over, by the detail it began with and denoise", ("", *first), rows
    if "again" in measured:
        names = {**METHODS, "enlarged": "bicubic"}
        rows = [(names[name], *(f"{value:.4f}" for value in told.values())) for name, told in measured["again"].items()]
        yield "the adapted model's drawings at twice their size", ("", *measured["again"]["predicted"]), rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.evaluation.predicting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    families.add_arguments(out)
    out.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures; with captions to draw them")
    out.add_argument(
        "--predictor",
        type=Path,
        metavar="FILE",
        default=tiny.FOLDERS["latent_upscale_models"] / tiny.PREDICTOR,
        help="detail predictor (default: tiny)",
    )
    figures.add_common_arguments(out)
    out.add_argument("--sheet", type=Path, metavar="FILE.jpg", help="write contact sheets beside this file")
    out.add_argument("--limit", type=figures.at_least(1), metavar="N", help="held-out pictures at most")
    out.add_argument("--captions", type=figures.at_least(0), default=0, metavar="N", help="known captions to draw")
    out.add_argument("--unknown", type=figures.at_least(0), default=0, metavar="N", help="held-out captions to draw")
    out.add_argument("--denoise", type=float, nargs="*", default=[], help="paint over, with these values above 0 to 1")
    out.add_argument(
        "--again", action="store_true", help="the adapted model's drawings of known captions at twice the size"
    )
    out.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    out.add_argument("--steps", type=figures.at_least(0), default=0, help="sampler steps (0: as recommended)")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; what was measured."""
    args = parser().parse_args(argv)
    if any(not 0 < denoise <= 1 for denoise in args.denoise):
        raise DAVAEError(f"--denoise is {args.denoise}; expected values above 0 and at most 1")
    if (args.denoise or args.again) and not args.captions:
        raise DAVAEError("--denoise and --again draw known captions: say how many as --captions")
    measured = measure(args)
    for title, head, rows in tables(measured):
        print(f"\n{title}\n\n{figures.table(head, rows)}")
    print(f"\n{figures.bounds_table([figures.bound_from_json(bound) for bound in measured['bounds']])}")
    for line in measured["not_measured"]:
        print(f"\nNot measured: {line}")
    print(f"\n{measured['seconds']:.0f} s")
    if args.json is not None:
        figures.write_json(args.json, measured)
    return measured


if __name__ == "__main__":
    command.run(main)
