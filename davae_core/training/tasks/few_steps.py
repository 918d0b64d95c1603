"""Stage 3: teach an adapted model to draw in few steps and without guidance, by a second LoRA.

    python -m davae_core.training steps micro --help

No images are needed: the adapted model teaches by its own drawings of the prompts. Writes a few-step LoRA.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ... import bases, checkpoints, tiny
from ... import sampling as sampler
from ...adapter import PAPER_TARGETS, AdapterConfig, Recommended, merge
from ...davae import DAVAE
from ...embeddings import Embeddings
from ...errors import DAVAEError
from ...few_steps import FewStepLora
from ...history import History, Identity, Role, identity
from ...images import tile
from ...prompts import encode, source
from ...sampling import Sampling
from ...text_encoder import TextEncoder
from .. import pretrained
from ..data import prompts
from ..data.config import DataConfig
from ..objective import FlowConfig
from ..run.config import OptimiserConfig, RunConfig
from ..run.launch import Images, Launch, launch
from ..run.task import Batch, Phase
from ..run.validation import SHEET_IMAGES
from ..text.asked import read_prompts
from . import pieces, sheets
from .begin import check_family
from .distribution import FAKE, DistributionPhase, Drawn, FakePhase
from .few_step_model import TEACHER, FewStepModel
from .redrawing import require_same_latent
from .rollout import STUDENT, Rollout
from .trajectory import TrajectoryPhase


@dataclass(frozen=True)
class FewStepsRecipe:
    """A few-step LoRA for a diffusion model with an adapter."""

    data: DataConfig
    """Text files with prompts, one a line, or folders and shards of images, of which only the captions are read."""
    run: RunConfig
    model: Path
    """The pretrained diffusion model: its file, a whole checkpoint, or a folder of diffusers' layout."""
    adapter: Path
    """File of its adapter."""
    autoencoder: Path
    """File of the DA-VAE, which draws the sheets of samples."""
    text_encoder: Path | None = None
    """File of the tiny model's text encoder, for the tiny model."""
    embeddings: Path | None = None
    """Folder of the prompts' embeddings, computed before (python -m davae_core.training text): no text encoder is
    loaded."""
    start: Path | None = None
    """Few-step LoRA whose weights the run starts from, for the same adapted model and of this rank; otherwise from no
    effect."""
    optimiser: OptimiserConfig = OptimiserConfig()
    method: Literal["trajectory", "distribution"] = "trajectory"
    """How the student learns. trajectory: each of its steps goes where the teacher goes in `substeps`. distribution:
    its pictures come to look like the teacher's as a whole (DMD2), by a third model that is trained meanwhile."""
    steps: int = 4
    """Steps in which the student draws."""
    shift: float = 0.0
    """Time shift of these steps; 0: what the adapter recommends."""
    cfg: float = 0.0
    """Guidance of the teacher, which the student learns; 0: what the adapter recommends."""
    substeps: int = 4
    """Steps of the teacher for one of the student, of the method trajectory."""
    flow: FlowConfig = FlowConfig(shift=0.0)
    """Noise at which pictures are compared, of the method distribution; a shift of 0 is that of the steps."""
    rank: int = 64
    """Rank and alpha of the LoRA."""
    targets: tuple[str, ...] = PAPER_TARGETS
    """Layers with a LoRA, in diffusers' names."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time."""
    frozen: Literal["fp32", "bf16"] = "fp32"
    """How the weights that are not trained are held. bf16 takes half the memory and, where the forward pass is in bf16,
    gives the same numbers."""
    file: str = tiny.FEW_STEPS
    """Name of the file that the run leaves in its folder."""


def check_settings(recipe: FewStepsRecipe) -> None:
    """Raise DAVAEError where a setting makes no sense or two contradict each other."""
    if min(recipe.steps, recipe.substeps, recipe.rank) < 1:
        raise DAVAEError(
            f"--steps, --substeps and --rank must be at least 1, got {recipe.steps}, {recipe.substeps}, {recipe.rank}"
        )
    if min(recipe.shift, recipe.cfg) < 0 or not math.isfinite(recipe.shift + recipe.cfg):
        raise DAVAEError(f"--shift and --cfg must be 0 or above, got {recipe.shift} and {recipe.cfg}")
    if recipe.frozen == "bf16" and recipe.run.precision != "bf16":
        raise DAVAEError(
            "weights held in bf16 need a forward pass in bf16: give --run.precision bf16 too, or --frozen fp32"
        )


@dataclass
class Parts:
    """What a few-step LoRA is trained with.

    Attributes:
        davae: in fp32.
        text: encodes prompts, or holds what they are encoded to.
        adapted: state dict of the diffusion model with its adapter.
        config: of the adapter: its latent, and how it is to be sampled.
        start: a few-step LoRA to start from.
        of: what these are to the LoRA that is made.
    """

    davae: DAVAE
    text: TextEncoder | Embeddings
    adapted: dict[str, torch.Tensor]
    config: AdapterConfig
    start: FewStepLora | None = None
    of: dict[Role, Identity] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: FewStepsRecipe) -> "Parts":
        """Out of the recipe's files."""
        davae = checkpoints.load_autoencoder(recipe.autoencoder, torch.float32)
        check_family(davae.latent, bases.SD3, recipe.autoencoder.name, "the model (--model) draws latents of SD3")
        adapter = checkpoints.load_adapter(recipe.adapter)
        require_same_latent(adapter.config, davae.latent, recipe.adapter.name)
        model = pretrained.diffusion_model(recipe.model)
        of: dict[Role, Identity] = {"base_model": identity("base_model", model, recipe.model.name)}
        of["davae"] = identity("davae", davae.state_dict(), recipe.autoencoder.name)
        adapted = merge(model, adapter)
        of["adapted_model"] = identity("adapted_model", adapted, recipe.adapter.name)
        start = None
        if recipe.start is not None:
            start, of["start"] = checkpoints.load_few_step_lora(recipe.start), Identity(recipe.start.name)
            check_continues(start, adapter.config, recipe)
        return cls(davae, source(recipe.text_encoder, recipe.embeddings), adapted, adapter.config, start, of)


class FewStepsTask:
    """Trains a few-step LoRA by the method of the recipe.

    Args:
        recipe: all settings.
        images: not used.
        parts: what is trained with; the recipe's files where it is not given.
    """

    def __init__(self, recipe: FewStepsRecipe, images: Images, parts: Parts | None = None) -> None:
        self.recipe = recipe
        check_settings(recipe)
        parts = parts or Parts.read(recipe)
        self.davae, self.text, self.of = parts.davae.requires_grad_(False), parts.text, parts.of
        if recipe.run.prompts is not None:  # a prompt without an embedding is found now and not at the first sheet
            encode(self.text, [asked.prompt for asked in read_prompts(recipe.run.prompts)], torch.device("cpu"))
        self.units, told = parts.config.latent, parts.config.recommended
        shift, cfg = recipe.shift or told.shift or 1.0, recipe.cfg or told.cfg or 1.0
        self.teaching = Sampling(shift, cfg, told.steps or Sampling.steps)
        self.recommended = Recommended(recipe.data.size, shift, 1.0, recipe.steps)
        names = [STUDENT] if recipe.method == "trajectory" else [STUDENT, FAKE]
        frozen = torch.bfloat16 if recipe.frozen == "bf16" else torch.float32
        self.model = FewStepModel(
            parts.adapted, self.units, names, recipe.rank, recipe.targets, recipe.run.seed, parts.start, frozen
        )
        if recipe.gradient_checkpointing:
            self.model.checkpoint_blocks()
        if recipe.run.compile:
            raise DAVAEError("--run.compile: the LoRAs of this stage are switched on and off, which is not compiled")
        rollout = Rollout(self.model, self.text, recipe.steps, shift, cfg)
        self.rollout = rollout
        factors, seed = self.model.factors(STUDENT), recipe.run.seed
        self.phases: dict[str, Phase] = {}
        if recipe.method == "trajectory":
            channels = self.units.base_channels
            self.phases["student"] = TrajectoryPhase(rollout, factors, seed, recipe.substeps, channels)
            return
        times, drawn = replace(recipe.flow, shift=recipe.flow.shift or shift), Drawn()
        self.phases["student"] = DistributionPhase(rollout, factors, seed, times, drawn)
        self.phases["fake"] = FakePhase(rollout, self.model.factors(FAKE), seed, times, drawn)

    def to(self, device: torch.device) -> None:
        """Move the model, the text encoder and the DA-VAE."""
        self.model.to(device)
        self.davae.to(device)
        if isinstance(self.text, TextEncoder):
            self.text.to(device)

    def sheet(self, batch: Batch) -> torch.Tensor:
        """The teacher's pictures of the prompts, and below them the student's; or the student's for the run's own.

        On the CPU, made one image after another.
        """
        like = batch["latent"][:1]
        with pieces.out_of_memory("to draw a sheet of samples", "--run.sample-every 0 draws one at the end alone"):
            if "asked" in batch:
                return sheets.drawn(batch["asked"], like, self.drawn)
            columns = [
                [self.drawn(caption, i, like, name).cpu() for name in (TEACHER, STUDENT)]
                for i, caption in enumerate(batch["caption"][:SHEET_IMAGES])
            ]
        return tile([torch.cat(row) for row in zip(*columns)])

    def drawn(self, caption: str, seed: int, like: torch.Tensor, name: str = STUDENT) -> torch.Tensor:
        """The picture of a caption, as large as that of the latent ``like [1, C + D, h, w]``."""
        noise = sampler.initial_noise(0, [seed], like.shape[1:]).to(like.device)
        z = self.units.denormalise(self.sampled([caption], noise, name))
        return pieces.decode(self.davae, z).float()

    def sampled(self, captions: Sequence[str], noise: torch.Tensor, name: str) -> torch.Tensor:
        """Latents of captions in the model's units, by the student or as the adapter recommends."""
        asked, empty = (encode(self.text, some, noise.device) for some in (captions, [""] * len(captions)))
        told = self.recommended
        how = self.teaching if name == TEACHER else Sampling(told.shift, told.cfg, told.steps)
        self.model.use(name)
        return sampler.sample_encoded(self.model, asked, empty, noise, how)

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Squared difference between the student's and the teacher's latents of the held-out prompts, from the same
        noise, of the base and of the detail channels."""
        sums, count = {"base": 0.0, "detail": 0.0}, 0
        for batch in batches:
            like = batch["latent"]
            noise = sampler.initial_noise(0, batch["position"].tolist(), like.shape[1:]).to(like.device)
            one, two = (self.sampled(batch["caption"], noise, name) for name in (STUDENT, TEACHER))
            parts = zip(sums, (one - two).square().tensor_split([self.units.base_channels], dim=1), strict=True)
            sums |= {group: sums[group] + float(part.mean((1, 2, 3)).sum()) for group, part in parts}
            count += len(like)
        return {f"{group}_from_teacher": total / count for group, total in sums.items()} if count else {}

    def export(self, folder: Path, history: History) -> list[Path]:
        """The few-step LoRA in fp32."""
        made = FewStepLora(self.units, self.recommended, self.model.lora(STUDENT))
        path = folder / self.recipe.file
        checkpoints.save_few_step_lora(path, made, history=replace(history, of=self.of))
        return [path]


def check_continues(start: FewStepLora, adapter: AdapterConfig, recipe: FewStepsRecipe) -> None:
    """Raise DAVAEError unless a run may go on from ``start``."""
    if start.hidden != adapter.hidden or start.latent.channels != adapter.latent.channels:
        raise DAVAEError(
            f"{recipe.start} is for a model of width {start.hidden} with {start.latent.channels} channels, "
            f"{recipe.adapter.name} for one of {adapter.hidden} with {adapter.latent.channels}; give the "
            "adapter that it was trained on"
        )
    wrong = {tensor.shape[0] for name, tensor in start.state.items() if name.endswith(".lora_A.weight")}
    if wrong != {recipe.rank}:
        raise DAVAEError(f"{recipe.start} has rank {', '.join(map(str, sorted(wrong)))}; give it as --rank")


def train(recipe: FewStepsRecipe, launch: Launch = launch) -> int:
    """Train on the prompts of the recipe; the exit code."""
    config = checkpoints.load_adapter(recipe.adapter).config
    multiple = config.latent.factor * config.patch
    side = recipe.data.size // config.latent.factor
    blank = prompts.Blank((config.latent.channels, side, side))
    return launch(recipe, multiple, FewStepsTask, latents=blank, collect=prompts.collect)
