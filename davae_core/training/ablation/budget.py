"""What a bench runs: files, length, seeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ... import tiny
from ...errors import DAVAEError
from ..places import ROOT
from ..run.config import Precision

FILES = {kind: folder / name for kind, folder, name in (
    ("model", tiny.FOLDERS["diffusion_models"], tiny.MODEL),
    ("text_encoder", tiny.FOLDERS["text_encoders"], tiny.TEXT_ENCODER),
    ("autoencoder", tiny.FOLDERS["vae"], tiny.AUTOENCODER),
    ("adapter", tiny.FOLDERS["loras"], tiny.ADAPTER),
    ("predictor", tiny.FOLDERS["latent_upscale_models"], tiny.PREDICTOR),
)}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Optimiser steps of each group."""

    adapter: int = 1500
    """Steps of a stage-2 training."""
    latent: int = 1000
    """Steps of a stage-1 training."""
    decoder: int = 400
    """Steps of a training of the decoder alone."""


@dataclass(frozen=True)
class BenchConfig:
    """Which variants, on what, and for how long."""

    variants: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """"group/name", or a whole group: adapter, latent, decoder, sampling; everything where nothing is named. A
    group's control always runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds of the trainings; each variant runs once with each. They also seed the noise of the drawings."""
    steps: Steps = Steps()
    batch: int = 64
    """Images in a step of stage 2."""
    latent_batch: int = 4
    """Images in a step of stage 1."""
    checkpoints: int = 5
    """Points of a curve."""
    captions: int = 48
    """Captions drawn at each of them, evenly spread over the training captions."""
    held_out: int = 32
    """Held-out pictures that stage 1 is measured on."""
    images: Path = ROOT / "micro" / "data"
    """Folder with train/, other/ and held_out/, as davae_core.training.tiny.data writes it."""
    out: Path = Path("output/ablation")
    """Folder of the bench. Started again, it goes on; started twice, the two share the work."""
    model: Path = FILES["model"]
    """The base model that every variant starts from."""
    text_encoder: Path = FILES["text_encoder"]
    """Its text encoder."""
    autoencoder: Path = FILES["autoencoder"]
    """The DA-VAE of the adapter, decoder and sampling groups; the latent group has its base VAE and its decoder."""
    adapter: Path = FILES["adapter"]
    """The adapter of the decoder and sampling groups."""
    predictor: Path = FILES["predictor"]
    """The predictor that variants of a residual detail put inside the DA-VAE."""
    precision: Precision = "auto"
    """Precision of the trainings, as --run.precision."""
    compile: bool = False
    """Compile the model of stage 2 with torch.compile: worth it from about a thousand steps."""
    quick: bool = False
    """One variant of each group and its control, one seed, two steps: does it run?"""
    table: bool = False
    """Only print the table of what is finished."""

    def __post_init__(self) -> None:
        counts = (
            self.batch,
            self.latent_batch,
            self.checkpoints,
            self.captions,
            self.held_out,
            *vars(self.steps).values(),
        )
        if not self.seeds or min(counts) < 1:
            raise DAVAEError(f"give at least one seed, and numbers of at least 1, got {self}")
        if self.checkpoints > min(vars(self.steps).values()):
            raise DAVAEError(f"{self.checkpoints} checkpoints do not fit into the shortest training, of {self.steps}")
