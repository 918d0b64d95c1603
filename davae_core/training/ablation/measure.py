"""What a variant's files draw, in a few figures that can be compared between latents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...davae import DAVAE
from ...evaluation import drawn, generate
from ...evaluation.drawn import Asked
from ...evaluation.family import Family, FamilyFiles, load_davae, load_family
from ...evaluation.generate import Prompt
from ...evaluation.pictures import find_pictures, read_squares, spread
from ...held_out import reconstruction_errors
from ...metrics import resize_bicubic
from ...perceptual import PerceptualDistance, load_perceptual
from ...sampling import Sampling
from .variants import Changes

BATCH = 16
Figures = dict[str, float]


@dataclass
class Pictures:
    """What is drawn and compared, read once.

    Attributes:
        asked: captions with their pictures.
        x: the pictures ``[N, 3, H, W]``.
        held_out: others, which nothing is trained on.
        distances: perceptual distances.
    """

    asked: list[Asked]
    x: torch.Tensor
    held_out: torch.Tensor
    distances: list[PerceptualDistance]

    @classmethod
    def read(cls, folder: Path, side: int, captions: int, held_out: int) -> "Pictures":
        """Captions evenly spread over the training pictures.

        Raises:
            DAVAEError: there are no pictures or no captions.
        """
        found = find_pictures(folder)
        some = [found.training[i] for i in spread(found.training, captions)]
        asked = [Asked(Prompt(i, picture.caption), picture) for i, picture in enumerate(some)]
        x = read_squares(some, side)
        held = read_squares(found.held_out[:held_out], side) if found.held_out else x[:0]
        return cls(asked, x, held, [load_perceptual("st-lpips-alex")])


@torch.no_grad()
def drawings(files: FamilyFiles, pictures: Pictures, seed: int, sampling: Changes) -> Figures:
    """Known captions against their own pictures.

    Args:
        files: the family.
        pictures: what is drawn.
        seed: of the noise.
        sampling: what differs from the adapter's recommendation.

    Returns:
        ``psnr``, ``st-lpips-alex``, ``mottle`` and its ratio to that of the reconstructions, ``off_white``;
        ``base_error`` and ``detail_error``: mean squared errors of the drawn latent, each channel in units of its
        standard deviation, whatever the adapter's own units are; the detail is the whole one, with what a predictor
        inside the DA-VAE expects, in units of the pictures' own.
    """
    family = load_family(files)
    how = replace(generate.adapted_sampling(family), **sampling)
    lists: drawn.Lists = {}
    details: list[tuple[torch.Tensor, torch.Tensor]] = []  # drawn, true
    for first in range(0, len(pictures.asked), BATCH):
        x = pictures.x[first : first + BATCH]
        z = _latents(family, pictures.asked[first : first + BATCH], seed, how)
        true = family.davae.encode(x)
        told = drawn.against(family.davae.decode(z).clamp(-1, 1), x, pictures.distances)
        again = drawn.against(family.davae.decode(true).clamp(-1, 1), x, [])
        told["floor_mottle"] = again["mottle"]
        units = family.davae.latent
        base, _ = units.split((units.normalise(z) - units.normalise(true)).square())
        told |= {"base_error": base.mean((1, 2, 3)).tolist()}
        details.append((family.davae.whole_detail(z), family.davae.whole_detail(true)))
        for name, values in told.items():
            lists.setdefault(name, []).extend(values)
    figures = drawn.means(lists)
    drawing, true = (torch.cat(parts) for parts in zip(*details, strict=True))
    variance = true.var(dim=(0, 2, 3), correction=0).clamp(min=1e-12)
    figures["detail_error"] = float(((drawing - true).square().mean(dim=(0, 2, 3)) / variance).mean())
    floor = figures.pop("floor_mottle")
    return figures | {"mottle_ratio": figures["mottle"] / floor if floor else float("nan")}


def _latents(family: Family, asked: Sequence[Asked], seed: int, how: Sampling) -> torch.Tensor:
    return generate.adapted_latents(family, [one.prompt for one in asked], seed, how)


@torch.no_grad()
def reconstructions(autoencoder: Path, pictures: Pictures) -> Figures:
    """Held-out pictures encoded and decoded: ``psnr``, its gain over the base VAE with bicubic enlargement, and
    ``st-lpips-alex``, named ``recon_...``; nothing without held-out pictures."""
    davae = load_davae(autoencoder)

    def both(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"davae": davae.decode(davae.encode(x)), "bicubic": _bicubic(davae, x)}

    told = reconstruction_errors(pictures.held_out.split(BATCH), both, pictures.distances)
    if not told:
        return {}
    gain = told["davae"]["psnr"] - told["bicubic"]["psnr"]
    figures = {f"recon_{name}": value for name, value in told["davae"].items()}
    return figures | {"recon_gain": gain}


def _bicubic(davae: DAVAE, x: torch.Tensor) -> torch.Tensor:
    return resize_bicubic(davae.decode_base(davae.encode_base(x)).clamp(-1, 1), davae.latent.scale)
