"""What is lost in few steps? ``python -m davae_core.evaluation.few_steps --images DIR --html F``.

The adapted model draws as its adapter recommends, with its guidance; then with a few-step LoRA, in several numbers of
steps and without guidance; and in the same numbers without the LoRA, to see what that is worth. Captions that the model
knows are compared with their own pictures (ST-LPIPS, mottle, recall), captions that it does not know as a set (Frechet
distance on ST-VGG features) and by their names. Diversity is the mean perceptual distance between pictures of one
caption that begin from other noise.

DIR holds ``train/`` and ``held_out/``, as davae_core.training.tiny.data writes them.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import atomic, command, devices, tiny
from ..errors import DAVAEError
from ..perceptual import PerceptualDistance
from ..sampling import Sampling
from . import drawn, figures, generate, page, recall
from . import family as families
from .drawing import asked_of, over_seeds
from .drawn import Asked, Shown
from .family import Family, load_family
from .figures import Bound
from .frechet import NAME as FRECHET
from .frechet import Features
from .pictures import find_pictures, references_of
from .reconstruction import available_metrics
from .references import References

ALEX = "st-lpips-alex"
RECALL, NAME, RATIO, FRECHET_RATIO, DIVERSITY = 0.97, 0.88, 1.15, 1.2, 0.8
WORDS = {
    ALEX: "ST-LPIPS",
    "psnr": "PSNR, dB",
    "mottle": "mottle",
    "off_white": "off white",
    "top1": "known: top-1",
    "name": "unknown: name right",
    FRECHET: "Frechet",
    "diversity": "diversity",
}
Figures = dict[str, float]

EXPLAINED = (
    "Ratios are to the first line. Without it: the adapted model in as few steps, without guidance and the LoRA.",
    *page.EXPLAINED[1:],
)


@dataclass(frozen=True)
class Way:
    """One way of drawing.

    Attributes:
        name: for tables.
        family: draws.
        sampling: how.
    """

    name: str
    family: Family
    sampling: Sampling


def ways_of(plain: Family, fast: Family, steps: Sequence[int]) -> list[Way]:
    """The adapter's recommendation first, then the LoRA in each number of steps, then those without it."""
    recommended, few = generate.adapted_sampling(plain), generate.adapted_sampling(fast)
    out = [Way(f"{recommended.steps} steps, cfg {recommended.cfg:g}", plain, recommended)]
    out += [Way(_with(count), fast, replace(few, steps=count)) for count in steps]
    return out + [Way(f"{count} without it", plain, replace(recommended, cfg=1.0, steps=count)) for count in steps]


def _with(count: int) -> str:
    return f"{count} with the LoRA"


@torch.no_grad()
def known(
    way: Way,
    asked: Sequence[Asked],
    seed: int,
    metrics: Sequence[PerceptualDistance],
    references: References,
    size: int,
    shown: Mapping[str, Shown],
) -> Figures:
    """Figures of captions against their own pictures; fills the rows of a sheet, by caption."""
    lists: drawn.Lists = {}
    verdicts: list[recall.Verdict] = []
    for some, x in drawn.batches(asked, size, generate.image_size(way.family), way.family, f"known, {way.name}"):
        prompts = [one.prompt for one in some]
        y = generate.adapted_images(way.family, prompts, seed, way.sampling)
        for name, values in drawn.against(y, x, metrics).items():
            lists.setdefault(name, []).extend(values)
        verdicts += recall.judge(y, [prompt.caption for prompt in prompts], references)
        for i, prompt in enumerate(prompts):
            if row := shown.get(prompt.caption):
                row.images |= {"true": x[i].cpu(), way.name: y[i].cpu()}
    return drawn.means(lists) | {"top1": recall.shares(verdicts)["top1"]}


@torch.no_grad()
def diversity(way: Way, asked: Sequence[Asked], seeds: int, distance: PerceptualDistance, size: int) -> float:
    """Mean distance between the pictures of a caption that so many seeds give, over the captions."""
    pairs = list(itertools.combinations(range(seeds), 2))
    values = []
    for first in range(0, len(asked), size):
        prompts = [one.prompt for one in asked[first : first + size]]
        drawings = [generate.adapted_images(way.family, prompts, seed, way.sampling) for seed in range(seeds)]
        values += [distance(drawings[a], drawings[b]).mean().item() for a, b in pairs]
    return statistics.fmean(values)


def measured_way(
    way: Way,
    parts: Mapping[str, Sequence[Asked]],
    seed: int,
    metrics: Sequence[PerceptualDistance],
    features: tuple[Features, torch.Tensor] | None,
    references: References,
    args: argparse.Namespace,
    shown: Mapping[str, Shown],
) -> Figures:
    """All figures of a way with one seed; the diversity, which has seeds of its own, is not among them."""
    told = known(way, parts["known"], seed, metrics, references, args.batch, shown)
    if parts["unknown"]:
        network, true = features or (None, None)
        unknown = drawn.unknown(
            way.family, parts["unknown"], seed, way.sampling, network, true, references, args.batch, ()
        )
        told |= {name: unknown[name] for name in ("name", FRECHET) if name in unknown}
    return told


def bounds_of(ways: Mapping[str, Mapping[str, float]], steps: int) -> list[Bound]:
    """What the recommended number of steps should reach, of the means over the seeds."""
    first, few = next(iter(ways.values())), ways[_with(steps)]
    bounds = [Bound(f"{steps} steps: known captions, recall top-1", few["top1"], at_least=RECALL)]
    if "name" in few:
        bounds.append(Bound(f"{steps} steps: unknown captions, name right", few["name"], at_least=NAME))
    limits = ((ALEX, RATIO), ("mottle", RATIO), (FRECHET, FRECHET_RATIO))
    for name, most in limits:
        if name in few and first[name]:
            bounds.append(Bound(f"{steps} steps / guided: {WORDS[name]}", few[name] / first[name], at_most=most))
    if few.get("diversity") and first.get("diversity"):
        ratio = few["diversity"] / first["diversity"]
        bounds.append(Bound(f"{steps} steps / guided: diversity", ratio, at_least=DIVERSITY))
    return bounds


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Shown]]:
    """Measure as the command line says: everything that goes into the JSON file, and the rows of a sheet.

    Raises:
        DAVAEError: weights or pictures are missing or do not fit.
    """
    start = time.monotonic()
    found = find_pictures(args.images, None)
    references = references_of(found)
    where = replace(families.files_of(args), few_steps=args.lora)
    device = devices.device(args.device)
    fast, plain = load_family(where, device), load_family(replace(where, few_steps=None), device)
    steps = sorted({*args.steps, fast.recommended.steps})
    metrics, lacking = available_metrics(device)
    parts = {"known": asked_of(found.training, args.captions, references), "unknown": []}
    if args.unknown and references.held_out_indices:
        parts["unknown"] = asked_of(found.held_out, args.unknown, references, held_out=True)
    features = None
    if parts["unknown"]:
        try:
            network = Features().to(device)
            true, _ = drawn.true_features(plain, [one.picture for one in parts["unknown"]], network, args.batch)
            features = network, true
        except DAVAEError as problem:
            lacking.append(f"{FRECHET}: {problem}")
    some = recall.spread(parts["known"], args.rows)
    shown = {one.prompt.caption: Shown(one.prompt.caption) for one in some}
    others = parts["unknown"] or parts["known"]
    varied = recall.spread(others, args.diverse)
    ways: dict[str, Any] = {}
    for way in ways_of(plain, fast, steps):
        rows: Mapping[str, Shown] = shown
        runs = {}
        for seed in args.seeds:
            runs[seed] = measured_way(way, parts, seed, metrics, features, references, args, rows)
            rows = {}
        spread_ = {} if not (metrics and varied) else {"diversity": diversity(way, varied, 8, metrics[0], args.batch)}
        told = over_seeds(runs) | {name: {"mean": value} for name, value in spread_.items()}
        ways[way.name] = {"sampling": asdict(way.sampling), "seeds": runs, "figures": told}
        print(f"{way.name}: {line(told)}", flush=True)
    means = {name: {key: value["mean"] for key, value in told["figures"].items()} for name, told in ways.items()}
    bounds = bounds_of(means, fast.recommended.steps)
    return {
        "command": "few_steps",
        "settings": {key: getattr(args, key) for key in ("captions", "unknown", "diverse", "seeds", "batch", "device")},
        "size": generate.image_size(plain),
        "recommended": asdict(fast.recommended),
        "ways": ways,
        "not_measured": lacking,
        "bounds": [bound.to_json() for bound in bounds],
        "passed": all(bound.passed for bound in bounds),
        "weights": where.hashes(),
        "versions": figures.versions(),
        "seconds": time.monotonic() - start,
    }, list(shown.values())


def line(told: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of a way for people."""
    return ", ".join(f"{title} {told[name]['mean']:.4g}" for name, title in WORDS.items() if name in told)


def table(measured: Mapping[str, Any]) -> tuple[Sequence[str], page.Rows]:
    """Head and rows: a line for each way, mean and spread over the seeds."""
    names = [name for name in WORDS if any(name in told["figures"] for told in measured["ways"].values())]

    def cell(value: Mapping[str, float] | None) -> str:
        if value is None:
            return "-"
        apart = value.get("spread")
        return page.number(value["mean"]) + (f" ± {apart:.2g}" if apart is not None and apart == apart else "")

    rows: page.Rows = [
        (name, *(cell(told["figures"].get(key)) for key in names)) for name, told in measured["ways"].items()
    ]
    return ("", *(WORDS[name] for name in names)), rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m davae_core.evaluation.few_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    families.add_arguments(out)
    out.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures with captions")
    out.add_argument(
        "--lora",
        type=Path,
        metavar="FILE",
        default=tiny.FOLDERS["loras"] / tiny.FEW_STEPS,
        help="few-step LoRA (default: tiny)",
    )
    figures.add_common_arguments(out)
    out.add_argument("--html", type=Path, metavar="FILE.html", help="write a report with pictures to this file")
    at_least = figures.at_least
    out.add_argument("--seeds", type=int, nargs="+", default=[0], help="noise seeds (default: 0)")
    out.add_argument("--steps", type=at_least(1), nargs="+", default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    out.add_argument("--captions", type=at_least(1), default=96, metavar="N", help="known captions (default: 96)")
    out.add_argument("--unknown", type=at_least(0), default=100, metavar="N", help="unknown ones (default: 100)")
    out.add_argument("--diverse", type=at_least(0), default=16, metavar="N", help="captions with 8 seeds (default: 16)")
    out.add_argument("--rows", type=at_least(1), default=24, metavar="N", help="rows of the report (default: 24)")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; what was measured."""
    args = parser().parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    measured, shown = measure(args)
    bounds = [figures.bound_from_json(bound) for bound in measured["bounds"]]
    print(f"\n{figures.table(*table(measured))}\n\n{figures.bounds_table(bounds)}")
    for lacking in measured["not_measured"]:
        print(f"\nNot measured: {lacking}")
    print(f"\n{measured['seconds']:.0f} s")
    if args.json is not None:
        figures.write_json(args.json, measured)
    if args.html is not None:
        settings = f"{measured['size']} px, seed {', '.join(map(str, args.seeds))}"
        tables = [("Ways of drawing", *table(measured))]
        report = page.report("Few steps", settings, measured, tables, {"Known captions": shown}, EXPLAINED)
        atomic.write(args.html, report.encode())
    return measured


if __name__ == "__main__":
    command.run(main)
