"""What a family draws, picture by picture: captions that it knows against their own pictures, and captions that it does
not know as a set. In batches, so that no more than a batch of pictures is held, but for those that a report shows.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..held_out import TIMES, velocity_errors
from ..metrics import psnr
from ..perceptual import PerceptualDistance
from ..sampling import Sampling
from . import generate, recall
from .family import Family
from .frechet import Features, frechet
from .generate import Prompt
from .ground import off_white
from .mottle import mottle
from .pictures import Picture, read_squares
from .references import References

Lists = dict[str, list[float]]


@dataclass(frozen=True)
class Asked:
    """A caption to draw and its true picture."""

    prompt: Prompt
    picture: Picture


@dataclass(frozen=True)
class Samplings:
    """How the adapted and the base model are sampled."""

    adapted: Sampling
    base: Sampling


@dataclass
class Shown:
    """A row of a report's sheet: images ``[3, h, w]`` in [-1, 1] by kind, and figures of the drawing."""

    caption: str
    images: dict[str, torch.Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def against(y: torch.Tensor, x: torch.Tensor, distances: Sequence[PerceptualDistance]) -> Lists:
    """Figures of pictures ``[B, 3, H, W]`` in [-1, 1] against the true ones, B each."""
    values = {"psnr": psnr(y, x)} | {distance.name: distance(y, x) for distance in distances}
    values |= {"mottle": mottle(y, x), "off_white": off_white(y, x)}
    return {name: value.tolist() for name, value in values.items()}


def mean(values: Iterable[float]) -> float:
    """Over those that are numbers; not a number where none is."""
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else float("nan")


def means(lists: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each list."""
    return {name: mean(values) for name, values in lists.items()}


def _add(lists: Lists, more: Mapping[str, Sequence[float]]) -> None:
    for name, values in more.items():
        lists.setdefault(name, []).extend(values)


def batches(
    asked: Sequence[Asked], size: int, side: int, family: Family, said: str
) -> Iterator[tuple[Sequence[Asked], torch.Tensor]]:
    """Captions with their pictures on the family's device, a batch at a time; says how far it is."""
    start = time.monotonic()
    for first in range(0, len(asked), size):
        some = asked[first : first + size]
        yield some, read_squares([one.picture for one in some], side).to(family.device)
        print(f"{said}: {first + len(some)} of {len(asked)}, {time.monotonic() - start:.0f} s", flush=True)


@torch.no_grad()
def reconstructed(family: Family, asked: Sequence[Asked], distances: Sequence[PerceptualDistance], size: int) -> Lists:
    """:func:`against` of the pictures' own reconstructions, one figure per picture: the floor of every drawing."""
    lists: Lists = {}
    for _, x in batches(asked, size, generate.image_size(family), family, "reconstructed"):
        _add(lists, against(family.davae.decode(family.davae.encode(x)).clamp(-1, 1), x, distances))
    return lists


@torch.no_grad()
def known(
    family: Family,
    asked: Sequence[Asked],
    seed: int,
    how: Samplings,
    distances: Sequence[PerceptualDistance],
    references: References,
    size: int,
    shown: Sequence[Shown] = (),
) -> tuple[dict[str, float], Lists]:
    """Draw captions that the model was trained on, and compare each drawing with its own picture.

    Args:
        family: the models.
        asked: captions and pictures.
        seed: of the noise.
        how: sampling of both models.
        distances: on the family's device.
        references: to look the drawings up in.
        size: pictures at a time.
        shown: rows of a sheet to fill, found by their captions.

    Returns:
        Means over the pictures, and the figures of each picture. Besides those of :func:`against`: ``base_error`` and
        ``detail_error``, mean squared errors of the drawn latent in the model's units; ``base_survives``, PSNR of the
        base channels' picture against the drawing at 1/s; ``native_error`` and ``native_psnr``, the base model's own
        drawing against the picture at 1/s; ``top1`` and ``top5``, recall.
    """
    lists: Lists = {}
    verdicts: list[recall.Verdict] = []
    rows = {row.caption: row for row in shown}
    spec = family.latent
    for some, x in batches(asked, size, generate.image_size(family), family, f"known captions, seed {seed}"):
        prompts = [one.prompt for one in some]
        z = generate.adapted_latents(family, prompts, seed, how.adapted)
        native = generate.base_latents(family, prompts, seed, how.base)
        true = family.davae.encode(x)
        y, x_small = family.davae.decode(z).clamp(-1, 1), family.davae.shrink(x)
        survived = family.davae.decode_base(spec.split(z)[0]).clamp(-1, 1)
        y_small = family.davae.decode_base(native).clamp(-1, 1)
        told = against(y, x, distances)
        base, detail = spec.split((spec.normalise(z) - spec.normalise(true)).square())
        own = (spec.normalise_base(native) - spec.normalise_base(spec.split(true)[0])).square()
        for name, error in (("base_error", base), ("detail_error", detail), ("native_error", own)):
            told[name] = error.mean((1, 2, 3)).tolist()
        told["base_survives"] = psnr(survived, family.davae.shrink(y)).tolist()
        told["native_psnr"] = psnr(y_small, x_small).tolist()
        _add(lists, told)
        verdicts += recall.judge(y, [prompt.caption for prompt in prompts], references)
        for i, prompt in enumerate(prompts):
            if row := rows.get(prompt.caption):
                again = family.davae.decode(true[i : i + 1]).clamp(-1, 1)[0]
                kinds = {"true": x[i], "reconstruction": again, "drawn": y[i], "base model": y_small[i]}
                row.images.update({kind: image.cpu() for kind, image in kinds.items()})
                row.figures.update({name: values[i] for name, values in told.items()})
    judged = recall.shares(verdicts)
    return means(lists) | {name: judged[name] for name in ("top1", "top5")}, lists


@torch.no_grad()
def unknown(
    family: Family,
    asked: Sequence[Asked],
    seed: int,
    sampling: Sampling,
    features: Features | None,
    true: torch.Tensor | None,
    references: References,
    size: int,
    shown: Sequence[Shown] = (),
) -> dict[str, float]:
    """Draw captions that the model was not trained on.

    Args:
        family, asked, seed, references, size, shown: as for :func:`known`.
        sampling: of the adapted model.
        features, true: of the Frechet distance, and ``[N, F]`` of the true pictures; None to leave it out.

    Returns:
        ``top1``, ``top5``, ``name`` and ``style`` of recall, and ``frechet-st-vgg``.
    """
    verdicts: list[recall.Verdict] = []
    found: list[torch.Tensor] = []
    rows = {row.caption: row for row in shown}
    for some, x in batches(asked, size, generate.image_size(family), family, f"unknown captions, seed {seed}"):
        prompts = [one.prompt for one in some]
        y = generate.adapted_images(family, prompts, seed, sampling)
        verdicts += recall.judge(y, [prompt.caption for prompt in prompts], references)
        if features is not None:
            found.append(features(y).cpu())
        for i, prompt in enumerate(prompts):
            if row := rows.get(prompt.caption):
                row.images.update({"true": x[i].cpu(), "drawn": y[i].cpu()})
    judged = recall.shares(verdicts)
    told = {name: judged[name] for name in recall.WORDS}
    if features is not None and true is not None:
        told["frechet-st-vgg"] = frechet(torch.cat(found), true)
    return told


@torch.no_grad()
def true_features(
    family: Family, pictures: Sequence[Picture], features: Features, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[N, F]`` of pictures, and of their reconstructions, whose distance is the floor of all drawings."""
    kinds: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for first in range(0, len(pictures), size):
        x = read_squares(pictures[first : first + size], generate.image_size(family)).to(family.device)
        y = family.davae.decode(family.davae.encode(x)).clamp(-1, 1)
        for kind, some in zip(kinds, (x, y), strict=True):
            kind.append(features(some).cpu())
    return torch.cat(kinds[0]), torch.cat(kinds[1])


@torch.no_grad()
def losses(
    family: Family, pictures: Sequence[Picture], size: int, times: Sequence[float] = TIMES
) -> dict[str, dict[str, float]]:
    """Error of the predicted velocity on pictures, by noise level: of the adapted model's base and detail channels, and
    of the base model on the same base latents and noise. See :func:`~davae_core.held_out.velocity_errors`."""
    spec, side = family.latent, generate.image_size(family)
    latents = []
    for first in range(0, len(pictures), size):
        some = pictures[first : first + size]
        z = spec.normalise(family.davae.encode(read_squares(some, side).to(family.device)))
        latents.append((z, [picture.caption for picture in some]))

    def adapted(x: torch.Tensor, t: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        return family.adapted(x, t, *family.encode(captions))

    def base(x: torch.Tensor, t: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        return torch.cat([family.base(spec.split(x)[0], t, *family.encode(captions)), spec.split(x)[1]], dim=1)

    channels = slice(spec.base_channels)
    groups = {"base": channels, "detail": slice(spec.base_channels, None)}
    return {
        "adapted": velocity_errors(adapted, latents, groups, times),
        "base_model": velocity_errors(base, latents, {"base": channels}, times),
    }


def denoised(family: Family, pictures: Sequence[Picture], size: int) -> dict[str, dict[str, float]]:
    """Error of the latent that is predicted in one step, by noise level: that of :func:`losses` times the time squared.
    At 1 it is what the model knows of a picture by its caption alone, without what a sampler adds."""
    told = losses(family, pictures, size, (*TIMES, 1.0))
    return {
        model: {name: float(name.partition("/t")[2]) ** 2 * value for name, value in values.items() if "/t" in name}
        for model, values in told.items()
    }
