"""Stage 1: train the detail branch and the joint decoder of a DA-VAE on a frozen base VAE.

    python -m davae_core.training autoencoder micro --help

Source: arXiv 2603.22125 sec. 3.1. Writes a DA-VAE file with the measured statistics of the detail channels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ... import bounds, checkpoints, tiny
from ...adapter import Recommended
from ...alignment import alignment_loss
from ...autoencoder import Autoencoder
from ...bases import Base
from ...davae import DAVAE
from ...errors import DAVAEError
from ...held_out import flat, reconstruction_errors
from ...history import History, Identity, Role, identity
from ...images import tile
from ...metrics import resize_bicubic
from ...perceptual import PerceptualDistance
from .. import pretrained
from ..data.config import DataConfig
from ..data.draws import Draws
from ..objective import Reconstruction, ReconstructionConfig, sampled, start_certain, statistics
from ..run.config import OptimiserConfig, RunConfig
from ..run.launch import Images, Launch, launch
from ..run.task import Batch, Losses, Phase
from ..run.validation import SHEET_IMAGES
from . import pieces
from .begin import check_units, decoder_from, measured_units, on_base, start_from
from .critic import CriticConfig, CriticPhase, PatchCritic, gradient_ratio
from .recompute import blocks_of, recompute
from .redrawing import RedrawConfig, Redrawing


@dataclass(frozen=True)
class AlignmentConfig:
    """How strongly the detail latent is drawn to the base latent (eq. 3-4)."""

    weight: float = 0.2
    """Weight of the alignment loss; 0 for none."""
    adaptive: bool = False
    """Multiply the weight by the ratio of the gradients of the other losses and of the alignment, on the last layer of
    the detail encoder."""


@dataclass(frozen=True)
class AutoencoderRecipe:
    """A DA-VAE on a base VAE."""

    data: DataConfig
    run: RunConfig
    base: Path
    """File of the base VAE (LDM layout: SD1, SDXL, SD3, FLUX.1, VA-VAE), or of a checkpoint with it."""
    family: str = ""
    """Base model whose VAE it is: sd1, sdxl, sd3, flux1 or vavae. It decides the units of the base latent; a file that
    says otherwise is refused. "" asks the file's metadata and name, then the shapes, by which FLUX.1's VAE counts as
    SD3's, and SD1's and SDXL's cannot be told apart."""
    start: Path | None = None
    """DA-VAE file whose weights the run starts from, on the same base VAE; otherwise from the base VAE's own parts."""
    decoder: Path | None = None
    """DA-VAE file on the same base VAE whose decoder the run starts from, with a detail branch that is new: for another
    number of detail channels or another alignment, in a part of the time."""
    optimiser: OptimiserConfig = OptimiserConfig(weight_decay=1e-4)
    losses: ReconstructionConfig = ReconstructionConfig(l1=2.0)
    alignment: AlignmentConfig = AlignmentConfig()
    critic: CriticConfig = CriticConfig()
    detail_channels: int = 16
    """D, a multiple of the base VAE's channels."""
    scale: int = 2
    """s, how much further the latent compresses in each direction."""
    train_trunk: bool = False
    """Give the detail branch a trunk of its own, trained; otherwise it uses the frozen base encoder's (SD3 recipe)."""
    freeze_detail: bool = False
    """Train the decoder alone: the latents, and with them the adapters made for `start`, stay what they are."""
    file: str = tiny.AUTOENCODER
    """Name of the file that the run leaves in its folder."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the decoder's blocks for the backward pass and compute the rest again: less memory, more
    time."""
    latent_noise: float = 0.0
    """Most noise that is added to base and detail before decoding, in standard deviations of each channel; its level is
    drawn for each sample from 0 to this. A decoder that has seen none paints a sampler's errors as spots."""
    redraw: RedrawConfig = RedrawConfig()
    """Latents that the adapted model has drawn over: what the decoder will be given. The others are noised as
    `latent_noise` says."""
    detail_dropout: float = 0.1
    """Share of samples whose whole detail latent is set to zero before decoding."""

    def __post_init__(self) -> None:
        bounds.share("detail-dropout", self.detail_dropout)


class AutoencoderPhase(Phase):
    """Everything but the critic. The base encoder and base decoder are frozen."""

    def __init__(
        self,
        model: DAVAE,
        recipe: AutoencoderRecipe,
        critic: PatchCritic | None,
        distance: PerceptualDistance | None = None,
        redrawing: Redrawing | None = None,
    ) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.losses = Reconstruction(recipe.losses, distance)
        self.reconstructions: dict[int, torch.Tensor] = {}  # for the critic, by micro-batch
        self._units_checked = False
        self._critic = (critic,)  # in a tuple: not a submodule, it is trained by its own phase
        self._redrawing = (redrawing,)  # likewise: it is not trained

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        recipe, model = self.recipe, self.model
        x = batch["image"]
        with torch.no_grad():
            z_base = pieces.encode_base(model, x).float()
        if not self._units_checked:
            self._units_checked = True
            check_units(z_base, model.latent)
        moments = self.moments(x)
        draws = Draws(recipe.run.seed, step, batch["position"])
        z_detail = sampled(moments, draws.normal("latent", z_base.new_empty(moments.chunk(2, dim=1)[0].shape)))
        z_detail = model.residual(z_base, z_detail)
        kept = (draws.uniform("detail") >= recipe.detail_dropout).to(z_detail).view(-1, 1, 1, 1)
        z = torch.cat([z_base, z_detail * kept], dim=1)
        given, (redrawing,) = self.disturbed(z, draws), self._redrawing
        if redrawing is not None:
            given = redrawing(z, given, batch["caption"], draws)
        y = model.decode(given)
        losses = self.losses(x, y, moments)
        critic = self._critic[0]
        if critic is not None and step >= recipe.critic.start:
            self.reconstructions[batch["micro"]] = y.detach().cpu()
            losses["adversarial"] = -critic(y).float().mean()
            weight = losses["loss"].new_tensor(recipe.critic.weight)
            if recipe.critic.adaptive and torch.is_grad_enabled():
                last = model.decoder.conv_out.weight
                weight = losses["adversarial_weight"] = weight * gradient_ratio(
                    losses["loss"], losses["adversarial"], last
                )
            losses["loss"] = losses["loss"] + weight * losses["adversarial"]
        return self._aligned(losses, moments, z_base)

    def disturbed(self, z: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Latents ``[B, C + D, h, w]`` with the noise that the decoder is to bear."""
        if not self.recipe.latent_noise:
            return z
        level = self.recipe.latent_noise * draws.uniform("level").to(z).view(-1, 1, 1, 1)
        units = self.model.latent
        return units.denormalise(units.normalise(z) + level * draws.normal("noise", z))

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Mean and log-variance of the detail latent; no gradient into a frozen trunk."""
        if self.model.detail_trunk is not None:
            return self.model.detail_moments(x)
        with torch.no_grad():
            features = pieces.features(self.model.base_encoder, self.model.config.base, x)
        return self.model.detail_down(features)

    def _aligned(self, losses: Losses, moments: torch.Tensor, z_base: torch.Tensor) -> Losses:
        """The losses with the alignment added."""
        config, spec = self.recipe.alignment, self.model.latent
        mean = moments.chunk(2, dim=1)[0].float()
        losses["alignment"] = alignment_loss(mean, spec.normalise_base(z_base))
        if config.weight:
            weight = losses["loss"].new_tensor(config.weight)
            if config.adaptive and torch.is_grad_enabled():
                ratio = gradient_ratio(losses["loss"], losses["alignment"], self.model.detail_down.conv.weight)
                losses["alignment_weight"] = weight * ratio
                weight = losses["alignment_weight"]
            losses["loss"] = losses["loss"] + weight * losses["alignment"]
        return losses


@dataclass
class Parts:
    """What a DA-VAE is trained with.

    Attributes:
        base: the base VAE, in fp32.
        family: the base model that it belongs to.
        distance: the perceptual distance; None loads the one of the recipe, if it has one.
        redrawing: draws over latents; None for none.
        of: what these are to the file that is made.
    """

    base: Autoencoder
    family: Base
    distance: PerceptualDistance | None = None
    redrawing: Redrawing | None = None
    of: dict[Role, Identity] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: AutoencoderRecipe) -> "Parts":
        """Out of the recipe's files."""
        if recipe.start is not None and recipe.decoder is not None:
            raise DAVAEError("--start brings its own decoder along; leave one of --start and --decoder out")
        base = pretrained.base_vae(recipe.base)
        redrawing = None
        if recipe.redraw.share:
            if recipe.start is None or not recipe.freeze_detail:
                raise DAVAEError(
                    "--redraw.share draws over latents that an adapter was trained on, so they have to stay what they "
                    "are: give that DA-VAE as --start, and --freeze-detail"
                )
            if recipe.redraw.frozen == "bf16" and recipe.run.precision != "bf16":
                raise DAVAEError(
                    "a model held in bf16 needs a forward pass in bf16: give --run.precision bf16 too, or "
                    "--redraw.frozen fp32"
                )
            redrawing = Redrawing.read(recipe.redraw, checkpoints.load_autoencoder(recipe.start).latent)
        of: dict[Role, Identity] = {"base_vae": identity("base_vae", base.state_dict(), recipe.base.name)}
        if begun := recipe.start or recipe.decoder:
            of["start"] = Identity(begun.name)
        return cls(base, pretrained.base_of_file(recipe.base, base.config, recipe.family), redrawing=redrawing, of=of)


class AutoencoderTask:
    """Trains :class:`AutoencoderPhase`, with a critic where the recipe has one, and leaves a DA-VAE file.

    Args:
        recipe: all settings.
        images: gives images to measure statistics on.
        parts: what is trained with; the recipe's files where it is not given.
    """

    def __init__(self, recipe: AutoencoderRecipe, images: Images, parts: Parts | None = None) -> None:
        torch.manual_seed(recipe.run.seed)
        self.recipe, self.images = recipe, images
        parts = parts or Parts.read(recipe)
        self.of = parts.of
        units = parts.family.normalisation or (0.0, 1.0)
        self.model = on_base(parts.base, recipe.detail_channels, recipe.scale, recipe.train_trunk, units)
        if parts.family.normalisation is None and recipe.start is None:
            self.model.set_base_units(*measured_units(self.model, images))
        start_certain(self.model.detail_down.conv)
        if recipe.start is not None:
            start_from(self.model, recipe.start, parts.family)
        elif recipe.decoder is not None:
            decoder_from(self.model, recipe.decoder, parts.family)
        if recipe.freeze_detail:
            freeze_detail(self.model, recipe)
        if recipe.gradient_checkpointing:
            recompute(blocks_of(self.model.decoder, self.model.detail_trunk or nn.Identity()))
        if recipe.run.compile:
            for part in (self.model.base_encoder.mid, self.model.decoder.mid, *self.model.decoder.up):
                part.compile()
        critic = PatchCritic(recipe.critic.width, recipe.critic.layers) if recipe.critic.weight else None
        self.phase = AutoencoderPhase(self.model, recipe, critic, parts.distance, parts.redrawing)
        self.redrawing = parts.redrawing
        self.phases: dict[str, Phase] = {"autoencoder": self.phase}
        if critic is not None:
            self.phases["critic"] = CriticPhase(critic, recipe.critic.start, self.phase.reconstructions)

    def to(self, device: torch.device) -> None:
        """Move the model, the critic, and the model that draws."""
        for phase in self.phases.values():
            phase.to(device)
        if self.redrawing is not None:
            self.redrawing.to(device)

    def sheet(self, batch: Batch) -> torch.Tensor:
        """Images; base latent decoded at half size and enlarged; reconstructions without and with detail.

        On the CPU, made one image after another.
        """
        with pieces.out_of_memory("to draw a sheet of samples", "--run.sample-every 0 draws one at the end alone"):
            columns = [[row.cpu() for row in self._shown(x)] for x in batch["image"][:SHEET_IMAGES].split(1)]
        return tile([torch.cat(row) for row in zip(*columns)])

    def _shown(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows of a sheet for one image ``[1, 3, H, W]``."""
        yield x
        z = pieces.encode(self.model, x)
        small = self.model.decode_base(self.model.latent.split(z)[0]).float()
        yield F.interpolate(small, size=x.shape[-2:], mode="bicubic")
        for strength in (0.0, 1.0):
            yield pieces.decode(self.model, z, strength).float()

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """PSNR and perceptual distance of the DA-VAE, and beside it of the base VAE with bicubic enlargement."""
        spec = self.model.latent

        def reconstruct(x: torch.Tensor) -> dict[str, torch.Tensor]:
            z = pieces.encode(self.model, x)
            small = self.model.decode_base(spec.split(z)[0]).float().clamp(-1, 1)
            return {"davae": pieces.decode(self.model, z), "base_bicubic": resize_bicubic(small, spec.scale)}

        distance = self.phase.losses.distance
        images = (x for batch in batches for x in batch["image"].split(1))
        return flat(reconstruction_errors(images, reconstruct, [distance] if distance else []))

    def export(self, folder: Path, history: History) -> list[Path]:
        """The DA-VAE in fp32, with the statistics of its detail channels."""
        if not self.recipe.freeze_detail:
            self.measure()
        path = folder / self.recipe.file
        recommended = Recommended(size=self.recipe.data.size)
        checkpoints.save_autoencoder(path, self.model, recommended, history=replace(history, of=self.of))
        return [path]

    def measure(self) -> None:
        """Take the statistics of the detail channels from the images, one after another."""
        channels = self.model.latent.base_channels
        advice = (
            "the state is saved, and --run.resume measures again: on a larger GPU, or on the CPU where there is none"
        )
        with pieces.out_of_memory("to measure the latents of the export", advice):
            latents = (pieces.encode(self.model, x)[:, channels:] for batch in self.images() for x in batch.split(1))
            mean, std = statistics(latents)
        self.model.set_detail_statistics(mean.tolist(), std.tolist())


def freeze_detail(model: DAVAE, recipe: AutoencoderRecipe) -> None:
    """Leave the decoder alone to be trained.

    Raises:
        DAVAEError: there are no trained latents to keep, or the alignment wants gradients of them.
    """
    if recipe.start is None:
        raise DAVAEError("freeze_detail keeps the latents of a trained DA-VAE: give its file as --start")
    if recipe.alignment.adaptive:
        raise DAVAEError("freeze_detail leaves the alignment nothing to train: use --alignment.no-adaptive")
    for name, parameter in model.named_parameters():
        if name.startswith("detail_"):
            parameter.requires_grad_(False)


def train(recipe: AutoencoderRecipe, launch: Launch = launch) -> int:
    """Train on the images of the recipe; the exit code."""
    factor = pretrained.base_vae(recipe.base).config.factor * recipe.scale
    return launch(recipe, factor, AutoencoderTask)
