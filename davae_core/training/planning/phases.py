"""What each phase of a training takes: the phase itself runs, on fake tensors, and is counted."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol, cast
from unittest import mock

import torch
from accelerate import Accelerator
from torch import nn

from ...autoencoder import AutoencoderConfig
from ...checkpoints import files
from ...history import History
from ...latent import LatentSpec
from ...mmdit import MMDiTConfig
from ..run import launch
from ..run.on_device import OnDevice
from ..run.player import Player
from ..run.precision import autocast
from ..run.task import Batch
from ..tasks.autoencoder import AutoencoderTask
from ..tasks.few_steps import FewStepsRecipe
from .counter import Counter, counting, off_device
from .skeletons import Recipe, task

DEVICE = torch.device("cpu")  # of the fake tensors, whatever it stands for


class Memory(Protocol):
    """What is measured: see :class:`Counter`."""

    @property
    def live(self) -> int:
        """Bytes held now."""

    @property
    def peak(self) -> int:
        """The most since :meth:`restart`."""

    @property
    def flops(self) -> int:
        """Operations since then."""

    def restart(self) -> None:
        """Begin a new phase."""


@dataclass
class Counted:
    """A training on one GPU.

    Attributes:
        trained: parameters.
        forward: operations of the forward pass of one image.
        step: operations of a training step of one image.
        held: bytes that lie on the GPU between two phases.
        image: bytes by which the backward pass grows with each image, about.
        peaks: the most bytes at once, by phase: step, sheet, statistics, export.
        cut: of what is held, bytes that FSDP divides among the GPUs; of these, ``weights`` are whole for the export.
        blocks: bytes of the two largest blocks that FSDP makes whole at a time.
    """

    trained: int = 0
    forward: float = 0.0
    step: float = 0.0
    held: int = 0
    image: float = 0.0
    peaks: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    weights: int = 0
    blocks: int = 0

    @property
    def most(self) -> int:
        """Of all phases."""
        return max(self.peaks.values())

    def sharded(self, gpus: int) -> "Counted":
        """The same with FSDP, by arithmetic: with one of ``gpus`` parts, and what is gathered for a while."""
        saved = self.cut - self.cut // gpus
        whole = {"export": self.weights - self.weights // gpus}
        peaks = {name: peak - saved + whole.get(name, self.blocks) for name, peak in self.peaks.items()}
        return replace(self, held=self.held - saved, peaks=peaks)


def count(recipe: Recipe, micro: int, text: int, several: bool = False, only_step: bool = False) -> Counted:
    """Run all phases of a training on fake tensors.

    Args:
        recipe: what is trained; its files are not read.
        micro: images at once.
        text: tokens of a prompt.
        several: one of several GPUs with DDP, which keeps the gradients in buckets.
        only_step: leave out the sheet, statistics and export.
    """
    with counting() as memory:
        return measure(recipe, micro, text, memory, several, only_step)


@torch.enable_grad()
def measure(
    recipe: Recipe,
    micro: int,
    text: int,
    memory: Memory,
    several: bool = False,
    only_step: bool = False,
    model: MMDiTConfig | None = None,
    base: AutoencoderConfig | None = None,
) -> Counted:
    """:func:`count` with whatever tensors there are.

    Args:
        recipe, micro, text, several, only_step: see there.
        memory: counts or measures.
        model, base: shapes of the diffusion model and of the base VAE, if not SD3.5-medium's.
    """
    recipe = replace(recipe, run=replace(recipe.run, precision="fp32" if recipe.run.precision == "fp32" else "bf16"))

    def images() -> Iterator[torch.Tensor]:
        # One of the images that come at once: they are encoded one after another.
        yield torch.zeros(launch.SURVEY_BATCH, 3, recipe.data.size, recipe.data.size)[:1]

    made = task(recipe, images, text, model, base)
    alone = cast(Accelerator, SimpleNamespace(num_processes=1, device=DEVICE))
    players = [Player(phase, recipe.optimiser, alone) for phase in made.phases.values()]
    batches = OnDevice([batch(memory, micro, recipe)], DEVICE)
    out = Counted()
    buckets = [prepare(player, out, several) for player in players]
    for player in players:
        descend(player, batches, recipe, memory, out)
    out.held = memory.live
    if not only_step:
        with ExitStack() as stack, torch.no_grad():
            memory.restart()
            for player in players:
                stack.enter_context(player.ema.applied())
            with autocast(recipe.run.precision, DEVICE):
                shown = batches[0]  # one picture is made after another, so one is enough
                kind = "latent" if "latent" in shown else "image"
                made.sheet(shown | {kind: shown[kind][:1], "caption": shown["caption"][:1]})
            del shown
            out.peaks["sheet"] = memory.peak
            if isinstance(made, AutoencoderTask) and not made.recipe.freeze_detail:
                memory.restart()
                made.measure()
                out.peaks["statistics"] = memory.peak
            memory.restart()
            with mock.patch.object(files, "save", not_written):
                made.export(Path(), History())
            out.peaks["export"] = memory.peak
    del buckets
    return out


def not_written(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """What writing a file needs on the device."""
    _ = [tensor.detach().contiguous() for tensor in tensors.values()]


def batch(memory: Memory, micro: int, recipe: Recipe) -> Batch:
    """What the loader gives, in the computer's memory."""
    kind, shape = "image", [micro, 3, recipe.data.size, recipe.data.size]
    if isinstance(recipe, FewStepsRecipe):
        spec = LatentSpec()
        kind, shape = "latent", [micro, spec.channels, *[recipe.data.size // spec.factor] * 2]
    with ExitStack() as stack:
        if isinstance(memory, Counter):
            stack.enter_context(off_device(memory))
        x = torch.zeros(shape)
    places = SimpleNamespace(tolist=lambda: list(range(micro)))  # numbers, because they seed generators
    return {kind: x, "caption": [""] * micro, "position": places, "micro": 0, "micros": 1}


def prepare(player: Player, out: Counted, several: bool) -> torch.Tensor | None:
    """Bring a player to where a later micro-batch of a later step finds it: with moments and gradients.

    Args:
        player: whose.
        out: gets what is known of its size.
        several: the gradients are parts of one bucket, which is returned.
    """
    parameters = list(player.parameters.values())
    numbers = sum(p.numel() for p in parameters)
    bucket = torch.zeros(numbers) if several else None
    start = 0
    for p in parameters:
        p.grad = torch.zeros_like(p) if bucket is None else bucket[start : start + p.numel()].view_as(p)
        start += p.numel()
    player.optimiser.step()  # makes the moments
    out.trained += numbers
    if shards := player.phase.shards():
        sizes = sorted((sum(p.nbytes for p in module.parameters()) for module in shards), reverse=True)
        out.weights += sizes[0]
        out.blocks += 2 * sizes[1]
        out.cut += sizes[0] + numbers * 4 * (4 if player.ema.average else 3)  # gradients, moments, average
    return bucket


def descend(player: Player, batches: OnDevice, recipe: Recipe, memory: Memory, out: Counted) -> None:
    """The last micro-batch of a step and the step itself, as the loop takes them."""
    memory.restart()
    held, images = memory.live, len(batches[0]["caption"])
    with autocast(recipe.run.precision, DEVICE):
        loss = player.phase(batches[0], player.phase.starts_at())["loss"]
    forward, peak = memory.flops, memory.peak
    memory.restart()
    loss.backward()
    out.forward += forward / images
    out.step += (forward + memory.flops) / images
    copies = 2 * sum(p.numel() for p in player.parameters.values())  # of the trained weights, in bf16
    out.image = max(out.image, (memory.peak - held - copies) / images)
    nn.utils.clip_grad_norm_(player.parameters.values(), recipe.optimiser.clip or math.inf)
    player.optimiser.step()
    player.ema.update(1)
    out.peaks["step"] = max(out.peaks.get("step", 0), peak, memory.peak)
