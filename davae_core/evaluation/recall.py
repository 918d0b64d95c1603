"""Does the tiny model draw what it is asked for, and does it compose? ``python -m davae_core.evaluation.recall``.

Each caption is drawn once, by the adapted model and, at 1/s of the size, by the base model. The picture is
average-pooled and compared with the reference pictures of all captions, as it is and mirrored. Recall: the nearest is
the caption's own (top-1), or one of the five nearest is (top-5). For a held-out pair, which was never trained on, it
also counts whether the nearest has the right name and the right style, a caption being "style name".

The captions and pictures are those of the tiny family, which ship small, or those of a folder (``--images``).
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from .. import command, devices, images
from ..errors import DAVAEError
from ..metrics import pooled_distance
from ..sampling import Sampling
from . import family as families
from . import figures, generate
from .family import Family, load_family
from .figures import Bound
from .generate import Prompt
from .pictures import find_pictures, references_of
from .references import References, load_references, split

T = TypeVar("T")
TOP = 5
# What the shipped models must reach, by part and figure.
BOUNDS = {("training", "top1"): 0.92, ("training", "top5"): 0.97, ("held_out", "name"): 0.9, ("held_out", "top5"): 0.75}
WORDS = {"top1": "top-1", "top5": "top-5", "name": "name right", "style": "style right"}
SHEET_COLUMNS = 20


@dataclass(frozen=True)
class Verdict:
    """One picture and the references nearest to it, nearest first."""

    caption: str
    nearest: tuple[str, ...]

    @property
    def top1(self) -> bool:
        """The nearest reference is the caption's own."""
        return self.nearest[0] == self.caption

    @property
    def top5(self) -> bool:
        """The caption's own reference is among the nearest."""
        return self.caption in self.nearest

    @property
    def name(self) -> bool:
        """The nearest reference has the caption's name, in whatever style."""
        return split(self.nearest[0])[1] == split(self.caption)[1]

    @property
    def style(self) -> bool:
        """The nearest reference has the caption's style, whatever its name."""
        return split(self.nearest[0])[0] == split(self.caption)[0]


def judge(pictures: torch.Tensor, captions: Sequence[str], references: References) -> list[Verdict]:
    """Find the references nearest to each picture.

    Args:
        pictures: ``[B, 3, H, W]`` in [-1, 1], no smaller than the references.
        captions: B of them, what was asked for.
        references: to compare with, all of them.
    """
    distance = pooled_distance(pictures, references.images.to(pictures.device))
    nearest = distance.topk(min(TOP, len(references.captions)), dim=1, largest=False).indices.tolist()
    return [
        Verdict(caption, tuple(references.captions[i] for i in row))
        for caption, row in zip(captions, nearest, strict=True)
    ]


def shares(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Share of verdicts with each property, and their count; the shares of no verdicts are not numbers."""
    count = len(verdicts)
    figures: dict[str, Any] = {
        key: sum(getattr(verdict, key) for verdict in verdicts) / count if count else float("nan") for key in WORDS
    }
    return {"count": count, **figures}


def summary(verdicts: Sequence[Verdict], references: References) -> dict[str, Any]:
    """:func:`shares` of the training captions and of the held-out pairs, these also by style; then the mistakes."""
    held_out = {references.captions[i] for i in references.held_out_indices}
    out = [verdict for verdict in verdicts if verdict.caption in held_out]
    by_style = {style: [v for v in out if split(v.caption)[0] == style] for style in references.styles}
    return {
        "training": shares([verdict for verdict in verdicts if verdict.caption not in held_out]),
        "held_out": {**shares(out), "by_style": {style: shares(some) for style, some in by_style.items() if some}},
        "mistakes": {verdict.caption: list(verdict.nearest) for verdict in verdicts if not verdict.top1},
    }


def bounds_of(name: str, figures: dict[str, Any]) -> list[Bound]:
    """The bounds of the parts that were measured, of one model."""
    return [
        Bound(f"{name}, {part.replace('_', '-')}: {WORDS[key]}", figures[part][key], at_least=least)
        for (part, key), least in BOUNDS.items()
        if figures[part]["count"]
    ]


def spread(indices: Sequence[T], most: int | None) -> list[T]:
    """At most so many of them, evenly spread; all of them for None."""
    if most is None or most >= len(indices):
        return list(indices)
    return [indices[i * len(indices) // most] for i in range(most)]


def choose(references: References, every: int, captions: int | None, held_out: int | None) -> list[Prompt]:
    """Every n-th training caption, then the held-out ones, each no more than asked for.

    Raises:
        DAVAEError: that is none at all.
    """
    chosen = spread(references.training[::every], captions) + spread(references.held_out_indices, held_out)
    if not chosen:
        raise DAVAEError("no captions to draw: let --captions or --held-out be above 0")
    return [Prompt(i, references.captions[i]) for i in chosen]


def draw(
    family: Family, name: str, prompts: Sequence[Prompt], seed: int, sampling: Sampling, batch: int
) -> torch.Tensor:
    """Pictures ``[N, 3, H, W]`` of the ``adapted`` or the ``base`` model, on the CPU; says how far it is."""
    make = generate.adapted_images if name == "adapted" else generate.base_images
    done: list[torch.Tensor] = []
    start = time.monotonic()
    for some in generate.batches(prompts, batch):
        done.append(make(family, some, seed, sampling).cpu())
        print(f"{name}: {sum(map(len, done))} of {len(prompts)}, {time.monotonic() - start:.0f} s", flush=True)
    return torch.cat(done)


def sheet(pictures: torch.Tensor, verdicts: Sequence[Verdict], references: References) -> torch.Tensor:
    """Pictures, each above its nearest reference, which is framed green where it is the right one, else red."""
    place = {caption: i for i, caption in enumerate(references.captions)}
    nearest = references.images[[place[verdict.nearest[0]] for verdict in verdicts]]
    nearest = F.interpolate(nearest, size=tuple(pictures.shape[2:]), mode="nearest-exact")
    return images.contact_sheet([pictures, images.framed(nearest, [v.top1 for v in verdicts])], SHEET_COLUMNS)


def figures_table(models: dict[str, dict[str, Any]]) -> str:
    """One line per model and part, held-out styles below their sum."""
    rows = []
    for name, model in models.items():
        parts = {"training": model["training"], "held-out": model["held_out"]}
        parts |= {f"  {style}": some for style, some in model["held_out"]["by_style"].items()}
        for part, some in parts.items():
            if some["count"]:
                rows.append((f"{name} {part}", str(some["count"]), *(f"{some[key]:.3f}" for key in WORDS)))
    return figures.table(("", "count", *WORDS.values()), rows)


def beside(path: Path, name: str) -> Path:
    """The file of the adapted model's sheet is the one given; the base model's has ``-base`` in its name."""
    return path if name == "adapted" else path.with_name(f"{path.stem}-{name}{path.suffix}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m davae_core.evaluation.recall", description=__doc__)
    families.add_arguments(out)
    out.add_argument(
        "--images", type=Path, metavar="DIR", help="captioned pictures (default: those of the tiny family)"
    )
    figures.add_common_arguments(out)
    out.add_argument("--sheet", type=Path, metavar="FILE.jpg", help="write a contact sheet to this file")
    out.add_argument("--seed", type=int, default=0, help="noise seed (default: 0)")
    out.add_argument(
        "--every", type=figures.at_least(1), default=5, help="draw every n-th training caption (default: 5)"
    )
    out.add_argument("--captions", type=figures.at_least(0), metavar="N", help="at most N training captions")
    out.add_argument("--held-out", type=figures.at_least(0), metavar="N", help="at most N held-out pairs")
    out.add_argument("--steps", type=figures.at_least(1), default=30, help="sampling steps (default: 30)")
    out.add_argument("--models", nargs="+", choices=("adapted", "base"), default=["adapted", "base"])
    return out


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Draw and judge as the command line says; everything that goes into the JSON file.

    Raises:
        DAVAEError: weights or references are missing, or nothing is to be drawn.
    """
    start = time.monotonic()
    references = references_of(find_pictures(args.images)) if args.images is not None else load_references()
    prompts = choose(references, args.every, args.captions, args.held_out)
    where = families.files_of(args)
    family = load_family(where, devices.device(args.device))
    samplings = {"adapted": generate.adapted_sampling(family, args.steps), "base": Sampling(steps=args.steps)}
    models: dict[str, dict[str, Any]] = {}
    bounds: list[Bound] = []
    for name in dict.fromkeys(args.models):
        began = time.monotonic()
        pictures = draw(family, name, prompts, args.seed, samplings[name], args.batch)
        verdicts = judge(pictures, [prompt.caption for prompt in prompts], references)
        settings = {"size": pictures.shape[-1], **asdict(samplings[name])}
        models[name] = {**settings, **summary(verdicts, references), "seconds": time.monotonic() - began}
        bounds += bounds_of(name, models[name])
        if args.sheet is not None:
            images.save_image(beside(args.sheet, name), sheet(pictures, verdicts, references))
    return {
        "command": "recall",
        "settings": {key: getattr(args, key) for key in ("every", "captions", "held_out", "seed", "batch", "device")},
        "references": {"count": len(references.captions), "size": references.images.shape[-1]},
        "models": models,
        "bounds": [bound.to_json() for bound in bounds],
        "passed": all(bound.passed for bound in bounds),
        "weights": where.hashes(),
        "versions": figures.versions(),
        "seconds": time.monotonic() - start,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; what was measured."""
    args = parser().parse_args(argv)
    measured = measure(args)
    print(f"\n{figures_table(measured['models'])}\n")
    print(figures.bounds_table([figures.bound_from_json(told) for told in measured["bounds"]]))
    if args.captions is not None or args.held_out is not None or args.every != 5:
        print("\nA quick run: the bounds are meant for --every 5 and all held-out pairs.")
    print(f"\n{measured['seconds']:.0f} s")
    if args.json is not None:
        figures.write_json(args.json, measured)
    return measured


if __name__ == "__main__":
    command.run(main)
