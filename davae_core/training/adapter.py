"""Stage 2: teach a pretrained SD3.5-layout model to draw DA-VAE latents.

    python -m davae_core.training.adapter micro --help

Source: arXiv 2603.22125 sec. 3.2. The embedder and the head, widened by zeros, are trained in full, the trunk by LoRA.
Writes an adapter file.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import checkpoints, flow, tiny
from ..adapter import EMBED, HEAD, PAPER_TARGETS, PREFIX, WIDENED, Adapter, Recommended, widen, zero_adapter
from ..checkpoints import files
from ..evaluation import generate
from ..latent import LatentSpec
from ..mmdit import MMDiT, MMDiTConfig
from ..text_encoder import TextEncoder
from . import lora, script
from .base_dit import FlowConfig, noised
from .captions import thinned
from .config import OptimiserConfig, RunConfig, from_command_line
from .data import DataConfig
from .draws import Draws
from .embeddings import present
from .latents import Encode, LatentCache
from .latents_cache import load_latents
from .report import tile
from .task import Batch, Losses, Phase

SHEET_IMAGES = 8


@dataclass(frozen=True)
class AdapterRecipe:
    """An adapter for a diffusion model, its text encoder and a DA-VAE."""

    data: DataConfig
    run: RunConfig
    model: Path
    """File of the pretrained diffusion model."""
    text_encoder: Path
    """File of its text encoder."""
    autoencoder: Path
    """File of the DA-VAE."""
    optimiser: OptimiserConfig = OptimiserConfig()
    flow: FlowConfig = FlowConfig(shift=4.0, min_snr=5.0)
    rank: int = 256
    """Rank and alpha of the LoRA; 0 trains the embedder and the head alone."""
    targets: tuple[str, ...] = PAPER_TARGETS
    """Layers with a LoRA, in diffusers' names."""
    detail_warmup: int = 10_000
    """Steps in which the weight of the detail channels rises from 0 to 1 (N_warm)."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time."""
    keep_latents: bool = False
    """Keep the latents of all images in memory."""
    latents: Path | None = None
    """Folder of the images' latents, computed before (python -m davae_core.training.latents_cache): the DA-VAE stays
    off the GPU and only draws the sample sheets."""
    recommended: Recommended = Recommended(shift=4.0, cfg=2.5, steps=30)
    """How the finished adapter is to be sampled; a size of 0 is the size of the data."""


class AdaptedModel(nn.Module):
    """A pretrained MMDiT that reads and predicts C + D channels; only what the adapter holds is trained.

    Args:
        base: state dict of the pretrained model.
        latent: the latent to adapt to.
        rank, targets: of the LoRA.
        seed: draws the LoRA's first factors.
    """

    def __init__(
        self, base: dict[str, torch.Tensor], latent: LatentSpec, rank: int, targets: tuple[str, ...], seed: int
    ) -> None:
        super().__init__()
        config = MMDiTConfig.from_state_dict(base)
        zero = zero_adapter(config, latent, rank, targets, torch.Generator().manual_seed(seed))
        self.adapter_config = zero.config
        self.start = {name: base[name].float().clone() for name in WIDENED}
        with torch.device("meta"):
            self.mmdit = MMDiT(replace(config, in_channels=latent.channels, out_channels=latent.channels))
        state = {name: tensor.float().clone() for name, tensor in base.items()}
        self.mmdit.load_state_dict(state | widen(state, zero), assign=True)
        self.mmdit.requires_grad_(False)
        for name in WIDENED:
            self.mmdit.get_parameter(name).requires_grad_(True)
        self.places = lora.attach(self.mmdit, zero)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """As :class:`MMDiT`, with ``x [B, C + D, h, w]``; text tokens that are all zeros fill up and are not read."""
        return self.mmdit(x, t, context, pooled, present(context))

    def checkpoint_blocks(self) -> None:
        """Compute the blocks again in the backward pass instead of keeping what is inside them."""
        for block in self.mmdit.joint_blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]

    def adapter(self, recommended: Recommended) -> Adapter:
        """What was learned, as an adapter."""
        config = replace(self.adapter_config, recommended=recommended)
        now = {name: self.mmdit.get_parameter(name).detach().float() for name in WIDENED}
        start = {name: tensor.to(now[name]) for name, tensor in self.start.items()}
        channels, positions = config.latent.base_channels, config.patch**2
        embed = f"{EMBED}weight"
        state = {
            f"{PREFIX}{EMBED}detail.weight": now[embed][:, channels:],
            f"{PREFIX}{EMBED}delta.weight": now[embed][:, :channels] - start[embed],
            f"{PREFIX}{EMBED}delta.bias": now[f"{EMBED}bias"] - start[f"{EMBED}bias"],
        }
        for part in ("weight", "bias"):
            rows = now[f"{HEAD}{part}"].unflatten(0, (positions, -1))
            state[f"{PREFIX}{HEAD}detail.{part}"] = rows[:, channels:].flatten(0, 1)
            state[f"{PREFIX}{HEAD}delta.{part}"] = rows[:, :channels].flatten(0, 1) - start[f"{HEAD}{part}"]
        return Adapter(config, state | lora.tensors(self.places))


class AdapterPhase(Phase):
    """Flow matching on base and detail channels, the weight of the detail rising (eq. 12-13)."""

    def __init__(self, model: AdaptedModel, recipe: AdapterRecipe, text: TextEncoder, latents: Encode) -> None:
        super().__init__()
        self.model, self.recipe, self.text, self.latents = model, recipe, text, latents

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        recipe = self.recipe
        z = self.latents(batch["image"])
        draws = Draws(recipe.run.seed, step, batch["position"])
        captions = thinned(batch["caption"], draws, recipe.flow.prompt_dropout, recipe.flow.word_dropout)
        context, pooled = generate.encode_captions(self.text, captions)
        point = noised(z, draws, recipe.flow)
        prediction = self.model(point.x, point.t, context, pooled)
        weight = flow.detail_weight(step, recipe.detail_warmup)
        channels = self.model.adapter_config.latent.base_channels
        loss, base, detail = flow.flow_loss(prediction, point.target, channels, weight, point.weight)
        return {"loss": loss, "base": base, "detail": detail, "detail_weight": loss.new_tensor(weight)}


class AdapterTask:
    """Trains :class:`AdapterPhase` and leaves an adapter."""

    def __init__(self, recipe: AdapterRecipe, images: script.Images) -> None:
        self.recipe = recipe
        self.davae = checkpoints.load_autoencoder(recipe.autoencoder, torch.float32).requires_grad_(False)
        self.text = checkpoints.load_text_encoder(recipe.text_encoder).float().requires_grad_(False)
        base, _ = files.read(recipe.model)
        seed = recipe.run.seed
        self.model = AdaptedModel(base, self.davae.latent, recipe.rank, recipe.targets, seed)
        if recipe.gradient_checkpointing:
            self.model.checkpoint_blocks()
        if recipe.run.compile:
            self.model.compile()
        latents: Encode = LatentCache(self.encode, recipe.keep_latents)
        if recipe.latents is not None:
            latents = load_latents(recipe.latents, recipe.autoencoder)
        self.phases: dict[str, Phase] = {"adapter": AdapterPhase(self.model, recipe, self.text, latents)}

    def to(self, device: torch.device) -> None:
        """Move the model, the text encoder and, unless the latents are computed already, the autoencoder."""
        self.phases["adapter"].to(device)
        if self.recipe.latents is None:
            self.davae.to(device)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images to latents in the model's units, on the device of the images."""
        device = next(self.davae.parameters()).device
        return self.davae.latent.normalise(self.davae.encode(x.to(device)).float()).to(x.device)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents in the model's units to images, on the device of the latents."""
        device = next(self.davae.parameters()).device
        return self.davae.decode(self.davae.latent.denormalise(z).to(device)).float().to(z.device)

    def sheet(self, batch: Batch) -> torch.Tensor:
        """Images, their reconstructions, samples for their captions."""
        x, captions = batch["image"][:SHEET_IMAGES], batch["caption"][:SHEET_IMAGES]
        z = self.encode(x)
        told = self.recipe.recommended
        noise = generate.initial_noise(0, range(len(x)), z.shape[1:]).to(x.device)
        sampling = generate.Sampling(told.shift, told.cfg, told.steps)
        samples = generate.sample(self.model, self.text, captions, noise, sampling)
        return tile([x, self.decode(z), self.decode(samples)])

    def export(self, folder: Path) -> list[Path]:
        """The adapter in fp32."""
        told = self.recipe.recommended
        adapter = self.model.adapter(replace(told, size=told.size or self.recipe.data.size))
        checkpoints.save_adapter(folder / tiny.ADAPTER, adapter)
        return [folder / tiny.ADAPTER]


def main(args: list[str] | None = None) -> int:
    """Train from the command line."""
    from .tiny.recipes import ADAPTER

    recipe = from_command_line(ADAPTER, __doc__, args)
    davae = checkpoints.load_autoencoder(recipe.autoencoder)
    patch = MMDiTConfig.patch
    return script.launch(recipe, davae.latent.factor * patch, lambda images: AdapterTask(recipe, images))


if __name__ == "__main__":
    script.main(main)
