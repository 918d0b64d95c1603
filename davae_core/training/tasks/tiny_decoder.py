"""Train a tiny decoder to make the pictures that a DA-VAE's joint decoder makes, in a small part of its time.

    python -m davae_core.training tiny_decoder micro --help

It learns from pictures alone. Writes a tiny decoder for the latents of the DA-VAE that it was trained with.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median

import torch

from ... import bases, checkpoints, tiny
from ...davae import DAVAE
from ...errors import DAVAEError
from ...history import History, Identity, Role, identity
from ...images import tile
from ...metrics import psnr
from ...perceptual import PerceptualDistance
from ...tiny_decoder import TinyDecoder, TinyDecoderConfig, mismatch
from ..data.config import DataConfig
from ..data.draws import Draws
from ..data.latents import LatentCache
from ..objective import Reconstruction, ReconstructionConfig
from ..run.config import OptimiserConfig, RunConfig
from ..run.launch import Images, Launch, launch
from ..run.task import Batch, Losses, Phase
from ..run.validation import SHEET_IMAGES
from . import pieces
from .begin import check_family


@dataclass(frozen=True)
class TinyDecoderRecipe:
    """A tiny decoder for the latents of a DA-VAE."""

    data: DataConfig
    run: RunConfig
    autoencoder: Path
    """File of the DA-VAE."""
    family: str | None = None
    """Base model whose VAE the DA-VAE must stand on: sd1, sdxl, sd3, flux1 or vavae; without it any is taken."""
    start: Path | None = None
    """Tiny decoder file whose weights the run starts from; otherwise from nothing."""
    optimiser: OptimiserConfig = OptimiserConfig(lr=1e-3, schedule="cosine")
    widths: tuple[int, ...] = (64, 64, 64, 64, 64)
    """Channels at each resolution, from the latent's to the image's; the last ones cost the most time."""
    losses: ReconstructionConfig = ReconstructionConfig(l1=1.0, l2=2.0, perceptual=1.0, kl=0.0)
    """Between the joint decoder's picture and its own."""
    perceptual_start: int = 0
    """Step at which the perceptual distance begins to count: before, steps take a small part of the time."""
    latent_noise: float = 0.3
    """Most noise that is added to the latents, in standard deviations; its level is drawn for each sample from 0 to
    this. The picture to learn is that without noise, for previews show latents that are not those of pictures yet."""
    detail_faded: float = 0.1
    """Share of samples whose detail is weakened, by a factor drawn from 0 to 1: early previews, and Detail Decode below
    full strength."""
    keep_latents: bool = False
    """Keep the latents of all images in memory, and the joint decoder's pictures of them."""
    file: str = tiny.DECODER
    """Name of the file that the run leaves in its folder."""


class TinyDecoderPhase(Phase):
    """Latents to the joint decoder's pictures of them."""

    def __init__(self, model: TinyDecoder, davae: DAVAE, recipe: TinyDecoderRecipe, loss: Reconstruction) -> None:
        super().__init__()
        self.model, self.recipe, self.loss = model, recipe, loss
        self.pixels = Reconstruction(replace(recipe.losses, perceptual=0.0))
        self._davae = (davae,)  # in a tuple: not a submodule, it is not trained
        self.latents = LatentCache(self.encode, recipe.keep_latents)
        self.pictures = LatentCache(lambda x: self.decode(self.latents(x)), recipe.keep_latents)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images to latents in the autoencoder's units."""
        (davae,) = self._davae
        return pieces.encode(davae, x).float()

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents in the autoencoder's units to the joint decoder's pictures."""
        (davae,) = self._davae
        return pieces.decode(davae, z).float().clamp(-1, 1)

    def kept(self, x: torch.Tensor, z: torch.Tensor, faded: torch.Tensor) -> torch.Tensor:
        """The pictures of images' latents ``z``, remembered but for the ``faded [B]`` ones."""
        pictures = self.pictures(x)
        if faded.any():
            pictures[faded] = self.decode(z[faded])
        return pictures

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        (davae,), recipe = self._davae, self.recipe
        draws = Draws(recipe.run.seed, step, batch["position"])
        spec, faded = davae.latent, draws.uniform("fade") < recipe.detail_faded
        base, detail = spec.split(self.latents(batch["image"]))
        strength = torch.where(faded, draws.uniform("strength"), 1.0).to(detail).view(-1, 1, 1, 1)
        z = torch.cat([base, detail * strength], dim=1)
        wanted = self.kept(batch["image"], z, faded) if recipe.keep_latents else self.decode(z)
        level = recipe.latent_noise * draws.uniform("level").to(z).view(-1, 1, 1, 1)
        y = self.model(spec.normalise(z) + level * draws.normal("noise", z))
        return (self.loss if step >= recipe.perceptual_start else self.pixels)(wanted, y)


@dataclass
class Parts:
    """What a tiny decoder is trained with.

    Attributes:
        davae: in fp32.
        start: a tiny decoder to start from.
        distance: the perceptual distance; None loads the recipe's, if it has one.
        of: what these are to the file that is made.
    """

    davae: DAVAE
    start: TinyDecoder | None = None
    distance: PerceptualDistance | None = None
    of: dict[Role, Identity] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: TinyDecoderRecipe) -> "Parts":
        """Out of the recipe's files."""
        davae = checkpoints.load_autoencoder(recipe.autoencoder, torch.float32)
        if recipe.family:
            check_family(davae.latent, bases.base_of(davae.config.base, recipe.family), recipe.autoencoder.name)
        of: dict[Role, Identity] = {"davae": identity("davae", davae.state_dict(), recipe.autoencoder.name)}
        if recipe.start is None:
            return cls(davae, of=of)
        start = checkpoints.load_tiny_decoder(recipe.start, torch.float32)
        return cls(davae, start, of=of | {"start": Identity(recipe.start.name)})


class TinyDecoderTask:
    """Trains :class:`TinyDecoderPhase` and leaves a tiny decoder.

    Args:
        recipe: all settings.
        images: of the data; nothing is measured on them.
        parts: what is trained with; the recipe's files where it is not given.
    """

    def __init__(self, recipe: TinyDecoderRecipe, images: Images, parts: Parts | None = None) -> None:
        torch.manual_seed(recipe.run.seed)
        self.recipe = recipe
        parts = parts or Parts.read(recipe)
        self.davae, self.of = parts.davae.requires_grad_(False), parts.of
        self.model = TinyDecoder(TinyDecoderConfig(self.davae.latent, recipe.widths))
        if parts.start is not None:
            check_continues(parts.start.config, self.model.config)
            self.model.load_state_dict(parts.start.state_dict())
        if recipe.run.compile:
            self.model.compile()
        loss = Reconstruction(recipe.losses, parts.distance)
        self.distance = loss.distance
        self.phases: dict[str, Phase] = {"tiny_decoder": TinyDecoderPhase(self.model, self.davae, recipe, loss)}

    def to(self, device: torch.device) -> None:
        """Move the tiny decoder and the DA-VAE."""
        self.phases["tiny_decoder"].to(device)
        self.davae.to(device)

    def sheet(self, batch: Batch) -> torch.Tensor:
        """Images; the joint decoder's pictures, and the tiny decoder's. On the CPU, one after another."""
        columns = [[x, *self._decoded(x)] for x in batch["image"][:SHEET_IMAGES].split(1)]
        return tile([torch.cat([row.cpu() for row in rows]) for rows in zip(*columns)])

    @torch.no_grad()
    def _decoded(self, x: torch.Tensor) -> list[torch.Tensor]:
        z = pieces.encode(self.davae, x).float()
        return [picture.float().clamp(-1, 1) for picture in (pieces.decode(self.davae, z), self.model.decode(z))]

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """How far the tiny decoder's pictures are from the joint decoder's, and its time as a part of that one's."""
        distances = [self.distance] if self.distance else []
        values: dict[str, list[float]] = {name: [] for name in ("psnr", *(distance.name for distance in distances))}
        seconds: tuple[list[float], list[float]] = ([], [])
        for x in (x for batch in batches for x in batch["image"].split(1)):
            z = pieces.encode(self.davae, x).float()
            pictures = []
            for decode, spent in zip((lambda z: pieces.decode(self.davae, z), self.model.decode), seconds):
                picture, time_taken = timed(decode, z)
                pictures.append(picture.float().clamp(-1, 1))
                spent.append(time_taken)
            joint, small = pictures
            values["psnr"] += psnr(small, joint).tolist()
            with torch.autocast(x.device.type, enabled=False):
                for distance in distances:
                    values[distance.name] += distance(small, joint).tolist()
        if not values["psnr"]:
            return {}
        told = {f"to_joint/{name}": fmean(some) for name, some in values.items()}
        return told | {"time_of_joint": median(seconds[1]) / median(seconds[0])}

    def export(self, folder: Path, history: History) -> list[Path]:
        """The tiny decoder in fp32."""
        path = folder / self.recipe.file
        checkpoints.save_tiny_decoder(path, self.model, history=replace(history, of=self.of))
        return [path]


def timed(decode: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The picture of ``z``, and the seconds that it took."""
    _wait(z.device)
    begun = time.perf_counter()
    picture = decode(z)
    _wait(z.device)
    return picture, time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_continues(start: TinyDecoderConfig, wanted: TinyDecoderConfig) -> None:
    """Raise DAVAEError unless a run may go on from a tiny decoder of the shape and units of ``start``."""
    if start.widths != wanted.widths:
        raise DAVAEError(
            f"the tiny decoder to start from (--start) has widths {start.widths}, expected {wanted.widths}; give its "
            "--widths"
        )
    if words := mismatch(start.latent, wanted.latent):
        raise DAVAEError(
            f"the tiny decoder to start from (--start) {words}. Give the DA-VAE it was trained with (--autoencoder)"
        )


def train(recipe: TinyDecoderRecipe, launch: Launch = launch) -> int:
    """Train on the images of the recipe; the exit code."""
    return launch(recipe, checkpoints.load_autoencoder(recipe.autoencoder).latent.factor, TinyDecoderTask)
