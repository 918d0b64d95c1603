"""Stage 2: teach a pretrained SD3.5-layout model to draw DA-VAE latents.

    python -m davae_core.training adapter micro --help

Source: arXiv 2603.22125 sec. 3.2. The embedder and the head, widened by zeros, are trained in full, the trunk by LoRA.
Writes an adapter file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ... import bases, bounds, checkpoints, flow, tiny
from ... import sampling as sampler
from ...adapter import PAPER_TARGETS, Adapter, Recommended
from ...davae import DAVAE
from ...embeddings import Embeddings
from ...errors import DAVAEError
from ...held_out import velocity_errors
from ...history import History, Identity, Role, identity
from ...images import tile
from ...mmdit import MMDiTConfig
from ...prompts import encode, source
from ...text_encoder import TextEncoder
from .. import pretrained
from ..data.config import DataConfig
from ..data.draws import Draws
from ..data.latents import Encode, LatentCache
from ..data.stored_latents import load_latents
from ..objective import FlowConfig, noised
from ..run.config import OptimiserConfig, RunConfig
from ..run.launch import Images, Launch, launch
from ..run.task import Batch, Losses, Phase
from ..run.validation import SHEET_IMAGES
from ..text.asked import read_prompts
from ..text.captions import thinned
from . import pieces, sheets
from .adapted import AdaptedModel
from .begin import check_family


@dataclass(frozen=True)
class AdapterRecipe:
    """An adapter for a diffusion model, its text encoder and a DA-VAE."""

    data: DataConfig
    run: RunConfig
    model: Path
    """The pretrained diffusion model: its file, a whole checkpoint, or a folder of diffusers' layout."""
    autoencoder: Path
    """File of the DA-VAE."""
    text_encoder: Path | None = None
    """File of the tiny model's text encoder, for the tiny model."""
    embeddings: Path | None = None
    """Folder of the captions' embeddings, computed before (python -m davae_core.training text): no text encoder is
    loaded."""
    start: Path | None = None
    """Adapter file whose weights the run starts from, for the same model and DA-VAE; of a lower rank it gets room to
    learn more, of a higher one it is reduced by its singular values. Otherwise from zero."""
    optimiser: OptimiserConfig = OptimiserConfig()
    flow: FlowConfig = FlowConfig(shift=4.0, min_snr=5.0)
    rank: int = 256
    """Rank and alpha of the LoRA; 0 trains the embedder and the head alone."""
    targets: tuple[str, ...] = PAPER_TARGETS
    """Layers with a LoRA, in diffusers' names."""
    detail_warmup: int = 10_000
    """Steps in which the weight of the detail channels rises from 0 to 1 (N_warm)."""
    detail_factor: float = 1.0
    """Factor on the spread by which the detail channels are divided. Above 1 they hold less signal at each time and
    come after the base: a factor k is a time shift by k of their own. The adapter's file keeps it."""
    zero_init: bool = True
    """Start the new columns of the embedder and rows of the head at zero, so that step 0 is the pretrained model; False
    draws them as wide as the pretrained ones."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time."""
    frozen: Literal["fp32", "bf16"] = "fp32"
    """How the weights that are not trained are held. bf16 takes half the memory and, where the forward pass is in bf16,
    gives the same numbers."""
    keep_latents: bool = False
    """Keep the latents of all images in memory."""
    latents: Path | None = None
    """Folder of the images' latents, computed before (python -m davae_core.training latents): the DA-VAE stays
    off the GPU and only draws the sample sheets."""
    file: str = tiny.ADAPTER
    """Name of the file that the run leaves in its folder."""
    recommended: Recommended = Recommended(shift=4.0, cfg=2.5, steps=30)
    """How the finished adapter is to be sampled; a size of 0 is the size of the data."""


class AdapterPhase(Phase):
    """Flow matching on base and detail channels, the weight of the detail rising (eq. 12-13)."""

    def __init__(
        self, model: AdaptedModel, recipe: AdapterRecipe, text: TextEncoder | Embeddings, latents: Encode
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.text, self.latents = model, recipe, text, latents
        self.channels = model.adapter_config.latent.base_channels

    def shards(self) -> list[nn.Module]:
        """See :class:`Phase`: each block, and the model around them."""
        return [*self.model.mmdit.joint_blocks, self.model.mmdit]

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        recipe = self.recipe
        z = given(batch, recipe.detail_factor, self.channels)
        z = self.latents(batch["image"]) if z is None else z
        draws = Draws(recipe.run.seed, step, batch["position"])
        captions = thinned(batch["caption"], draws, recipe.flow.prompt_dropout, recipe.flow.word_dropout)
        point = noised(z, draws, recipe.flow)
        prediction = self.model(point.x, point.t, *encode(self.text, captions, z.device))
        weight = flow.detail_weight(step, recipe.detail_warmup)
        loss, base, detail = flow.flow_loss(prediction, point.target, self.channels, weight, point.weight)
        return {"loss": loss, "base": base, "detail": detail, "detail_weight": loss.new_tensor(weight)}


def given(batch: Batch, factor: float, base_channels: int) -> torch.Tensor | None:
    """The latents that a batch holds instead of images, detail divided by ``factor``; None where it has images."""
    if "latent" not in batch or factor == 1:
        return batch.get("latent")
    base, detail = batch["latent"].tensor_split([base_channels], dim=1)
    return torch.cat([base, detail / factor], dim=1)


def check_settings(recipe: AdapterRecipe) -> None:
    """Raise DAVAEError where a setting makes no sense or two contradict each other."""
    bounds.above_0("detail-factor", recipe.detail_factor)
    bounds.above_0("flow.shift", recipe.flow.shift)
    bounds.require("rank", recipe.rank, recipe.rank >= 0, "at least 0; 0 trains the embedder and the head alone")
    if recipe.start is not None and not recipe.zero_init:
        raise DAVAEError("--no-zero-init draws what --start brings along; leave one of the two out")
    if recipe.frozen == "bf16" and recipe.run.precision != "bf16":
        raise DAVAEError(
            "weights held in bf16 need a forward pass in bf16: give --run.precision bf16 too, or --frozen fp32"
        )
    if recipe.embeddings is not None and recipe.flow.word_dropout:
        raise DAVAEError(
            f"captions without some of their words have no embedding: {recipe.flow.word_dropout=} needs to be 0 with "
            "--embeddings (--flow.word-dropout 0)"
        )


@dataclass
class Parts:
    """What an adapter is trained with.

    Attributes:
        davae: in fp32.
        text: encodes captions, or holds what they are encoded to.
        model: state dict of the pretrained diffusion model.
        start: an adapter to start from.
        of: what these are to the adapter that is made.
    """

    davae: DAVAE
    text: TextEncoder | Embeddings
    model: dict[str, torch.Tensor]
    start: Adapter | None = None
    of: dict[Role, Identity] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: AdapterRecipe) -> "Parts":
        """Out of the recipe's files."""
        davae = checkpoints.load_autoencoder(recipe.autoencoder, torch.float32)
        check_family(davae.latent, bases.SD3, recipe.autoencoder.name, "the model (--model) draws latents of SD3")
        text = source(recipe.text_encoder, recipe.embeddings)
        model = pretrained.diffusion_model(recipe.model)
        of: dict[Role, Identity] = {
            "base_model": identity("base_model", model, recipe.model.name),
            "davae": identity("davae", davae.state_dict(), recipe.autoencoder.name),
        }
        if recipe.start is None:
            return cls(davae, text, model, of=of)
        return cls(
            davae, text, model, checkpoints.load_adapter(recipe.start), of | {"start": Identity(recipe.start.name)}
        )


class AdapterTask:
    """Trains :class:`AdapterPhase` and leaves an adapter.

    Args:
        recipe: all settings.
        images: of the data; nothing is measured on them here.
        parts: what is trained with; the recipe's files where it is not given.
    """

    def __init__(self, recipe: AdapterRecipe, images: Images, parts: Parts | None = None) -> None:
        self.recipe = recipe
        check_settings(recipe)
        parts = parts or Parts.read(recipe)
        self.davae, self.text, self.of = parts.davae.requires_grad_(False), parts.text, parts.of
        if recipe.run.prompts is not None:  # a prompt without an embedding is found now and not at the first sheet
            encode(self.text, [asked.prompt for asked in read_prompts(recipe.run.prompts)], torch.device("cpu"))
        spread = tuple(recipe.detail_factor * std for std in self.davae.latent.detail_std)
        self.units = replace(self.davae.latent, detail_std=spread)
        self.model = AdaptedModel(
            parts.model,
            self.units,
            recipe.rank,
            recipe.targets,
            recipe.run.seed,
            parts.start,
            torch.bfloat16 if recipe.frozen == "bf16" else torch.float32,
            recipe.zero_init,
        )
        if recipe.gradient_checkpointing:
            self.model.checkpoint_blocks()
        if recipe.run.compile:
            self.model.compile()
        latents = LatentCache(self.encode, recipe.keep_latents)
        self.held_out = LatentCache(self.encode, keep=True)
        self.phases: dict[str, Phase] = {"adapter": AdapterPhase(self.model, recipe, self.text, latents)}

    def to(self, device: torch.device) -> None:
        """Move the model, the text encoder and, unless the latents are computed already, the autoencoder."""
        self.phases["adapter"].to(device)
        if self.recipe.latents is None:
            self.davae.to(device)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images to latents in the model's units, on the device of the images."""
        device = next(self.davae.parameters()).device
        return self.units.normalise(pieces.encode(self.davae, x.to(device)).float()).to(x.device)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents in the model's units to images, on the device of the latents."""
        device = next(self.davae.parameters()).device
        return pieces.decode(self.davae, self.units.denormalise(z).to(device)).float().to(z.device)

    def sheet(self, batch: Batch) -> torch.Tensor:
        """Images (where they are not given as latents), their reconstructions, samples for their captions; or samples
        for the run's own prompts.

        On the CPU, made one image after another.
        """
        count = min(SHEET_IMAGES, len(batch["caption"]))
        columns: list[list[torch.Tensor]] = []
        with pieces.out_of_memory("to draw a sheet of samples", "--run.sample-every 0 draws one at the end alone"):
            if "asked" in batch:
                return sheets.drawn(batch["asked"], self.latent(batch, slice(1)), self.drawn)
            for i in range(count):
                one = slice(i, i + 1)
                z = self.latent(batch, one)
                shown = [batch["image"][one]] if "image" in batch else []
                shown += [self.decode(z), self.drawn(batch["caption"][i], i, z)]
                columns.append([picture.cpu() for picture in shown])
        return tile([torch.cat(row) for row in zip(*columns)])

    def latent(self, batch: Batch, some: slice) -> torch.Tensor:
        """Latents in the model's units of some images of a batch, which may hold these instead of images."""
        z = given(batch, self.recipe.detail_factor, self.units.base_channels)
        return self.encode(batch["image"][some]) if z is None else z[some]

    def drawn(self, caption: str, seed: int, like: torch.Tensor) -> torch.Tensor:
        """The image drawn for a caption, as large as that of the latent ``like [1, C + D, h, w]``."""
        told, device = self.recipe.recommended, like.device
        noise = sampler.initial_noise(0, [seed], like.shape[1:]).to(device)
        sampling = sampler.Sampling(told.shift, told.cfg, told.steps)
        asked, empty = (encode(self.text, [text], device) for text in (caption, ""))
        return self.decode(sampler.sample_encoded(self.model, asked, empty, noise, sampling))

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Error of the velocity by noise level, of the base and of the detail channels."""

        def predict(x: torch.Tensor, t: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
            return self.model(x, t, *encode(self.text, captions, x.device))

        channels = self.units.base_channels
        known = ((given(batch, self.recipe.detail_factor, channels), batch) for batch in batches)
        latents = ((self.held_out(batch["image"]) if z is None else z, batch["caption"]) for z, batch in known)
        return velocity_errors(predict, latents, {"base": slice(channels), "detail": slice(channels, None)})

    def export(self, folder: Path, history: History) -> list[Path]:
        """The adapter in fp32."""
        told = self.recipe.recommended
        adapter = self.model.adapter(replace(told, size=told.size or self.recipe.data.size))
        checkpoints.save_adapter(folder / self.recipe.file, adapter, history=replace(history, of=self.of))
        return [folder / self.recipe.file]


def train(recipe: AdapterRecipe, launch: Launch = launch) -> int:
    """Train on the images of the recipe; the exit code."""
    davae = checkpoints.load_autoencoder(recipe.autoencoder)
    patch = MMDiTConfig.patch
    latents = load_latents(recipe.latents, recipe.autoencoder) if recipe.latents else None
    return launch(recipe, davae.latent.factor * patch, AdapterTask, latents=latents)
