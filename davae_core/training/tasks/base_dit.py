"""Train an MMDiT in SD3.5's layout and a text encoder of word embeddings from nothing: the base of the tiny models.

    python -m davae_core.training base_dit micro --help

Writes a diffusion model that ComfyUI loads as an SD3.5 model, and the text encoder for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ... import bases, bounds, checkpoints, tiny
from ... import sampling as sampler
from ...checkpoints import files, metadata
from ...errors import DAVAEError
from ...held_out import velocity_errors
from ...history import History, identity
from ...images import tile
from ...mmdit import MMDiT, MMDiTConfig, sincos_grid
from ...text_encoder import TextEncoder, TextEncoderConfig
from .. import pretrained
from ..data import sources
from ..data.config import DataConfig
from ..data.draws import Draws
from ..data.latents import LatentCache
from ..objective import FlowConfig, noised
from ..run.config import OptimiserConfig, RunConfig
from ..run.launch import Images, Launch, launch
from ..run.task import Batch, Losses, Phase
from ..run.validation import SHEET_IMAGES
from ..text.captions import thinned, vocabulary
from . import sheets

SHEET_STEPS = 20


@dataclass(frozen=True)
class BaseDiTRecipe:
    """A base diffusion model on the latents of a base autoencoder."""

    data: DataConfig
    run: RunConfig
    autoencoder: Path
    """File of the base autoencoder."""
    optimiser: OptimiserConfig = OptimiserConfig()
    flow: FlowConfig = FlowConfig()
    model: MMDiTConfig = MMDiTConfig()
    text_length: int = 8
    """Tokens of a prompt."""
    keep_latents: bool = False
    """Keep the latents of all images in memory."""
    cfg: float = 2.5
    """Guidance scale of the sample sheets."""


class BaseDiTPhase(Phase):
    """Flow matching on latents in the model's units."""

    def __init__(self, model: MMDiT, text: TextEncoder, latents: LatentCache, config: FlowConfig, seed: int) -> None:
        super().__init__()
        self.model, self.text = model, text
        self.latents, self.config, self.seed = latents, config, seed

    def forward(self, batch: Batch, step: int) -> Losses:
        """See :class:`Phase`."""
        x0 = self.latents(batch["image"])
        draws = Draws(self.seed, step, batch["position"])
        captions = thinned(batch["caption"], draws, self.config.prompt_dropout, self.config.word_dropout)
        context, pooled = sampler.encode_captions(self.text, captions)
        point = noised(x0, draws, self.config)
        prediction = self.model(point.x, point.t, context, pooled)
        error = ((prediction.float() - point.target) ** 2).mean(dim=(1, 2, 3))
        loss = error.mean() if point.weight is None else (error * point.weight).mean()
        return {"loss": loss, "error": error.mean()}


class BaseDiTTask:
    """Trains :class:`BaseDiTPhase`; leaves the model and the text encoder."""

    def __init__(self, recipe: BaseDiTRecipe, images: Images) -> None:
        bounds.above_0("flow.shift", recipe.flow.shift)
        self.recipe = recipe
        self.autoencoder = pretrained.base_vae(recipe.autoencoder).requires_grad_(False)
        family = pretrained.base_of_file(recipe.autoencoder, self.autoencoder.config, bases.SD3.name)
        self.shift, self.scale = family.normalisation or (0.0, 1.0)  # SD3's, as ComfyUI takes them for such a model
        captions = [caption for source in sources.index(recipe.data.images) for caption in source.captions]
        if not any(captions):
            raise DAVAEError("none of the images has a caption; put a .txt beside each image")
        torch.manual_seed(recipe.run.seed)
        config = TextEncoderConfig(vocabulary(captions), recipe.text_length, recipe.model.context, recipe.model.pooled)
        self.text = TextEncoder(config)
        nn.init.normal_(self.text.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text.position_embedding, std=0.02)
        self.model = fresh(recipe.model)
        if recipe.run.compile:
            self.model.compile()
        latents = LatentCache(self.encode, recipe.keep_latents)
        self.held_out = LatentCache(self.encode, keep=True)
        self.phases: dict[str, Phase] = {
            "dit": BaseDiTPhase(self.model, self.text, latents, recipe.flow, recipe.run.seed)
        }

    def to(self, device: torch.device) -> None:
        """Move the model, the text encoder and the autoencoder."""
        self.phases["dit"].to(device)
        self.autoencoder.to(device)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images to latents in the model's units."""
        return (self.autoencoder.encode(x).float() - self.shift) * self.scale

    def sheet(self, batch: Batch) -> torch.Tensor:
        """Images above samples with their captions, or samples for the run's own prompts; one after another."""
        x, captions = batch["image"][:SHEET_IMAGES], batch["caption"][:SHEET_IMAGES]
        z = self.encode(x[:1])
        if "asked" in batch:
            return sheets.drawn(batch["asked"], z, self.drawn)
        return tile([x.cpu(), torch.cat([self.drawn(caption, i, z).cpu() for i, caption in enumerate(captions)])])

    def drawn(self, caption: str, seed: int, like: torch.Tensor) -> torch.Tensor:
        """The image drawn for a caption, as large as that of the latent ``like [1, C, h, w]``."""
        noise = sampler.initial_noise(0, [seed], like.shape[1:]).to(like.device)
        sampling = sampler.Sampling(self.recipe.flow.shift, self.recipe.cfg, SHEET_STEPS)
        z = sampler.sample(self.model, self.text, [caption], noise, sampling)
        return self.autoencoder.decode(z / self.scale + self.shift).float()

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Error of the velocity by noise level."""

        def predict(x: torch.Tensor, t: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
            return self.model(x, t, *sampler.encode_captions(self.text, captions))

        latents = ((self.held_out(batch["image"]), batch["caption"]) for batch in batches)
        return velocity_errors(predict, latents, {"base": slice(None)})

    def export(self, folder: Path, history: History) -> list[Path]:
        """The diffusion model and the text encoder, fp32."""
        vae = identity("base_vae", self.autoencoder.state_dict(), self.recipe.autoencoder.name)
        told = metadata.history_entry(replace(history, of={"base_vae": vae}))
        files.save(folder / tiny.MODEL, self.model.state_dict(), {"modelspec.title": "Base diffusion model", **told})
        checkpoints.save_text_encoder(folder / tiny.TEXT_ENCODER, self.text)
        return [folder / tiny.MODEL, folder / tiny.TEXT_ENCODER]


def fresh(config: MMDiTConfig) -> MMDiT:
    """A new model: every block starts as the identity, the prediction at zero (as in DiT, arXiv 2212.09748)."""
    model = MMDiT(config)
    model.get_buffer("pos_embed").copy_(sincos_grid(config.grid, config.hidden))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    for embedder in (model.t_embedder, model.y_embedder):
        for name, weight in embedder.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(weight, std=0.02)
    for name, weight in model.named_parameters():
        if "adaLN_modulation" in name:
            nn.init.zeros_(weight)
    nn.init.zeros_(model.final_layer.linear.weight)
    return model


def train(recipe: BaseDiTRecipe, launch: Launch = launch) -> int:
    """Train on the images of the recipe; the exit code."""
    multiple = 8 * recipe.model.patch
    # The last block's text queries are read by nobody: the norm of these queries gets no gradient.
    return launch(recipe, multiple, BaseDiTTask, unused=True)
