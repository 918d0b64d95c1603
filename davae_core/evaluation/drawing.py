"""How well does a family draw? ``python -m davae_core.evaluation.drawing --images DIR --json F --html F``.

Captions that the model was trained on are drawn, and each drawing is compared with its own picture: perceptual distance
(ST-LPIPS), PSNR, mottle (unevenness where the picture is flat), speckles on white ground, and the error of the drawn
latent. The pictures' own reconstructions are the floor of all of these. Captions that it does not know are drawn too;
their pictures are compared as a set (Frechet distance on ST-VGG features), and looked up among all pictures (recall).
On held-out pictures the loss is measured by noise level, and the DA-VAE's reconstruction.

DIR holds ``train/`` and ``held_out/``, as davae_core.training.tiny.data writes them, or training pictures alone, with
captions in .txt or .json files beside them; --held-out names a folder of held-out ones. Pictures are cut to a square of
the size that the adapter's file recommends.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import atomic, command, devices
from ..errors import DAVAEError
from ..perceptual import PerceptualDistance
from ..sampling import Sampling
from . import drawn, figures, generate, page, reconstruction
from . import family as families
from .drawn import Asked, Samplings, Shown
from .family import Family, load_family
from .figures import Bound
from .frechet import NAME as FRECHET
from .frechet import Features, frechet
from .generate import Prompt
from .pictures import Picture, Pictures, find_pictures, read_batches, references_of, spread
from .references import References, split

MOTTLE, DISTANCE, PSNR_DB, OFF_WHITE, RECALL, NAME, SURVIVES_DB = 1.1, 0.05, 24.5, 0.003, 0.98, 0.9, 20.0

Figures = dict[str, float]


def asked_of(pictures: Sequence[Picture], count: int, references: References, held_out: bool = False) -> list[Asked]:
    """At most so many captions, evenly spread, with their pictures: of those that the references hold as captions that
    were trained on, or as held-out ones. A caption's noise depends on its place among the references.

    Raises:
        DAVAEError: there is none.
    """
    indices = references.held_out_indices if held_out else references.training
    place = {references.captions[i]: i for i in indices}
    there = [picture for picture in pictures if picture.caption in place]
    some = [there[i] for i in spread(there, count)]
    return [Asked(Prompt(place[picture.caption], picture.caption), picture) for picture in some]


def composes(references: References) -> bool:
    """Whether captions are "style name" and each held-out one has a name and a style that others have."""
    styles, names = zip(*(split(references.captions[i]) for i in references.training), strict=True)
    out = [split(references.captions[i]) for i in references.held_out_indices]
    return bool(out) and all(style in styles and name in names for style, name in out)


def over_seeds(runs: Mapping[int, Figures]) -> dict[str, dict[str, float]]:
    """Mean of each figure over the seeds, and its spread: the standard deviation, not a number for one seed."""
    out = {}
    for name in next(iter(runs.values())):
        values = [run[name] for run in runs.values()]
        spread_ = statistics.stdev(values) if len(values) > 1 else float("nan")
        out[name] = {"mean": sum(values) / len(values), "spread": spread_}
    return out


def bounds_of(measured: Mapping[str, Any]) -> list[Bound]:
    """What a family should reach, of the figures that were measured, by their means over the seeds."""
    known = {name: told["mean"] for name, told in measured["known"]["figures"].items()}
    bounds = [
        Bound("known captions: mottle / that of the reconstructions", known["mottle_ratio"], at_most=MOTTLE),
        Bound("known captions: PSNR, dB", known["psnr"], at_least=PSNR_DB),
        Bound("known captions: share of ground off white", known["off_white"], at_most=OFF_WHITE),
        Bound("known captions: recall top-1", known["top1"], at_least=RECALL),
        Bound(
            "known captions: PSNR of base channels with the drawing, dB", known["base_survives"], at_least=SURVIVES_DB
        ),
    ]
    if "st-lpips-alex" in known:
        bounds.insert(1, Bound("known captions: st-lpips-alex", known["st-lpips-alex"], at_most=DISTANCE))
    if measured["unknown"] and measured["unknown"]["composes"]:
        name = measured["unknown"]["figures"]["name"]["mean"]
        bounds.append(Bound("unknown captions: name right", name, at_least=NAME))
    if measured["held_out"]:
        bounds += reconstruction.bounds_of(measured["held_out"]["reconstruction"])
    return bounds


def measure_known(
    family: Family,
    asked: Sequence[Asked],
    how: Samplings,
    metrics: Sequence[PerceptualDistance],
    references: References,
    args: argparse.Namespace,
    shown: Sequence[Shown],
) -> dict[str, Any]:
    """Figures of the captions that the model knows; ``mottle_ratio`` is mottle over that of the reconstructions."""
    floor = drawn.means(drawn.reconstructed(family, asked, metrics, args.batch))
    runs: dict[int, Figures] = {}
    for number, seed in enumerate(args.seeds):
        rows = shown if number == 0 else ()
        runs[seed], _ = drawn.known(family, asked, seed, how, metrics, references, args.batch, rows)
        runs[seed]["mottle_ratio"] = runs[seed]["mottle"] / floor["mottle"] if floor["mottle"] else float("nan")
    denoised = drawn.denoised(family, [one.picture for one in asked], args.batch)
    return {"count": len(asked), "floor": floor, "seeds": runs, "figures": over_seeds(runs), "denoised": denoised}


def measure_unknown(
    family: Family,
    asked: Sequence[Asked],
    how: Samplings,
    references: References,
    args: argparse.Namespace,
    shown: Sequence[Shown],
    lacking: list[str],
) -> dict[str, Any]:
    """Figures of the captions that the model was not trained on."""
    features, true, floor = None, None, {}
    try:
        features = Features().to(family.device)
        true, again = drawn.true_features(family, [one.picture for one in asked], features, args.batch)
        floor = {FRECHET: frechet(again, true)}
    except DAVAEError as problem:
        lacking.append(f"{FRECHET}: {problem}")
        features = None
    runs: dict[int, Figures] = {}
    for number, seed in enumerate(args.seeds):
        rows = shown if number == 0 else ()
        runs[seed] = drawn.unknown(family, asked, seed, how.adapted, features, true, references, args.batch, rows)
    told = {"count": len(asked), "floor": floor, "seeds": runs, "figures": over_seeds(runs)}
    return told | {"composes": composes(references)}


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Shown], list[Shown]]:
    """Measure as the command line says: everything that goes into the JSON file, and rows for a report's sheets.

    Raises:
        DAVAEError: weights or pictures are missing or do not fit.
    """
    start = time.monotonic()
    found = find_pictures(args.images, args.held_out)
    print(f"reading {len(found.training) + len(found.held_out)} pictures", flush=True)
    references = references_of(found)
    where = families.files_of(args)
    family = load_family(where, devices.device(args.device))
    metrics, lacking = reconstruction.available_metrics(family.device)
    how = Samplings(generate.adapted_sampling(family, args.steps), Sampling(steps=args.steps or Sampling.steps))
    if args.cfg:
        how = replace(how, adapted=replace(how.adapted, cfg=args.cfg))
    if args.detail_cfg:
        how = replace(how, adapted=replace(how.adapted, detail_cfg=args.detail_cfg))
    asked = asked_of(found.training, args.captions, references)
    shown = [Shown(one.prompt.caption) for one in asked[:: max(1, len(asked) // args.rows)][: args.rows]]
    measured: dict[str, Any] = {
        "command": "drawing",
        "settings": {key: getattr(args, key) for key in ("captions", "unknown", "limit", "seeds", "batch", "device")},
        "size": generate.image_size(family),
        "pictures": {"training": len(found.training), "held_out": len(found.held_out)},
        "sampling": {"adapted": asdict(how.adapted), "base": asdict(how.base)},
        "known": measure_known(family, asked, how, metrics, references, args, shown),
        "unknown": None,
        "held_out": None,
        "not_measured": lacking,
    }
    others: list[Shown] = []
    if args.unknown and references.held_out_indices:
        asked = asked_of(found.held_out, args.unknown, references, held_out=True)
        others = [Shown(one.prompt.caption) for one in asked[:: max(1, len(asked) // args.rows)][: args.rows]]
        measured["unknown"] = measure_unknown(family, asked, how, references, args, others, lacking)
    else:
        lacking.append("captions that the model does not know: no held-out picture has one of its own, or --unknown 0")
    if found.held_out:
        measured["held_out"] = measure_held_out(family, found, metrics, args)
    else:
        lacking.append("loss and reconstruction on held-out pictures: give a folder with them as --held-out")
    bounds = bounds_of(measured)
    measured |= {
        "bounds": [bound.to_json() for bound in bounds],
        "passed": all(bound.passed for bound in bounds),
        "weights": where.hashes(),
        "versions": figures.versions(),
        "seconds": time.monotonic() - start,
    }
    return measured, shown, others


def measure_held_out(
    family: Family, found: Pictures, metrics: Sequence[PerceptualDistance], args: argparse.Namespace
) -> dict[str, Any]:
    """Reconstruction and loss by noise level, on held-out pictures."""
    some = found.held_out[: args.limit]
    batches = reconstruction.progress(read_batches(some, args.batch, family.device), len(some))
    return {
        "count": len(some),
        "reconstruction": reconstruction.compare(family.davae, batches, metrics),
        "loss": drawn.losses(family, some, args.batch),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.evaluation.drawing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    families.add_arguments(out)
    out.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures with captions")
    out.add_argument("--held-out", type=Path, metavar="DIR", help="held-out pictures (default: DIR/held_out)")
    figures.add_common_arguments(out)
    out.add_argument("--html", type=Path, metavar="FILE.html", help="write a report with pictures to this file")
    out.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="noise seeds; each draws everything (default: 0)"
    )
    out.add_argument(
        "--captions", type=figures.at_least(1), default=96, metavar="N", help="known captions to draw (default: 96)"
    )
    out.add_argument(
        "--unknown", type=figures.at_least(0), default=100, metavar="N", help="unknown ones (default: 100)"
    )
    out.add_argument(
        "--limit", type=figures.at_least(1), default=100, metavar="N", help="held-out pictures at most (default: 100)"
    )
    out.add_argument("--rows", type=figures.at_least(1), default=24, help="pictures in the report (default: 24)")
    out.add_argument("--steps", type=figures.at_least(0), default=0, help="sampler steps (0: as recommended)")
    out.add_argument("--cfg", type=float, default=0.0, help="guidance of the adapted model (0: as recommended)")
    out.add_argument(
        "--detail-cfg", type=float, default=0.0, help="guidance of its detail channels (0: as of the base)"
    )
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; what was measured."""
    args = parser().parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    measured, shown, others = measure(args)
    for title, head, rows in page.tables(measured):
        print(f"\n{title}\n\n{figures.table(head, rows)}")
    print(f"\n{figures.bounds_table([figures.bound_from_json(bound) for bound in measured['bounds']])}")
    for line in measured["not_measured"]:
        print(f"\nNot measured: {line}")
    print(f"\n{measured['seconds']:.0f} s")
    if args.json is not None:
        figures.write_json(args.json, measured)
    if args.html is not None:
        atomic.write(args.html, page.html(measured, shown, others).encode())
    return measured


if __name__ == "__main__":
    command.run(main)
