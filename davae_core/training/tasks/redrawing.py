"""Latents that the adapted model has drawn over, for a decoder to learn from what it will be given.

A picture's latent is noised to a random time, and the adapted model takes it back to a latent as it would in sampling:
of the same picture, with the errors that this model makes. Noise alone (``latent_noise``) has not their shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ... import checkpoints, flow
from ...adapter import AdapterConfig, merge
from ...embeddings import Embeddings
from ...errors import DAVAEError
from ...latent import LatentSpec
from ...mmdit import MMDiT
from ...prompts import encode, source
from ...text_encoder import TextEncoder
from .. import pretrained
from ..data.draws import Draws
from .adapted import frozen_model, units


@dataclass(frozen=True)
class RedrawConfig:
    """Which latents are drawn over, and by what."""

    share: float = 0.0
    """Share of samples whose latent the adapted model draws over; 0 for none, and then nothing is loaded."""
    model: Path | None = None
    """The pretrained diffusion model."""
    adapter: Path | None = None
    """Its adapter, trained on the latents of `start`."""
    text_encoder: Path | None = None
    """File of the tiny model's text encoder, for the tiny model."""
    embeddings: Path | None = None
    """Folder of the captions' embeddings (python -m davae_core.training text)."""
    earliest: float = 0.1
    """Least time that a latent is noised to; 0 is the latent as it is."""
    latest: float = 1.0
    """Most; 1 is noise alone, of which only a caption that the model knows by heart brings the picture back."""
    steps: int = 6
    """Steps in which it comes back."""
    frozen: Literal["fp32", "bf16"] = "fp32"
    """How the adapted model is held; bf16 takes half the memory."""

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 < self.earliest <= self.latest <= 1 and self.steps >= 1):
            raise DAVAEError(
                "redraw.share must be from 0 to 1, 0 < redraw.earliest <= redraw.latest <= 1 and redraw.steps at least "
                f"1, got {self}"
            )


class Redrawing:
    """Draws over latents.

    Args:
        config: how many, and how far.
        model: the adapted model, frozen.
        adapter: its units, and the shift and guidance that it is sampled with.
        text: encodes captions.
    """

    def __init__(
        self, config: RedrawConfig, model: MMDiT, adapter: AdapterConfig, text: TextEncoder | Embeddings
    ) -> None:
        self.config, self.model, self.text = config, model, text
        self.units, told = adapter.latent, adapter.recommended
        self.shift, self.cfg = told.shift or 1.0, told.cfg or 1.0

    @classmethod
    def read(cls, config: RedrawConfig, latent: LatentSpec) -> "Redrawing":
        """Out of the files that the settings name, for a DA-VAE of this latent.

        Raises:
            DAVAEError: a file is missing, or the adapter is for another DA-VAE.
        """
        if config.model is None or config.adapter is None:
            raise DAVAEError("--redraw.share needs the model that draws: give --redraw.model and --redraw.adapter")
        text = source(config.text_encoder, config.embeddings)
        adapter = checkpoints.load_adapter(config.adapter)
        require_same_latent(adapter.config, latent, config.adapter.name)
        state = merge(pretrained.diffusion_model(config.model), adapter)
        return cls(
            config,
            frozen_model(state, torch.bfloat16 if config.frozen == "bf16" else torch.float32),
            adapter.config,
            text,
        )

    def to(self, device: torch.device) -> None:
        """Move the models."""
        self.model.to(device)
        if isinstance(self.text, TextEncoder):
            self.text.to(device)

    @torch.no_grad()
    def __call__(self, z: torch.Tensor, others: torch.Tensor, captions: Sequence[str], draws: Draws) -> torch.Tensor:
        """Latents ``[B, C + D, h, w]`` in the autoencoder's units: some of ``z`` drawn over, in place of the rest
        ``others``."""
        config, x = self.config, self.units.normalise(z.float())
        chosen = (draws.uniform("redraws") < config.share).to(z.device)
        if not chosen.any():
            return others
        t = config.earliest + (config.latest - config.earliest) * draws.uniform("time").to(x)
        y = flow.add_noise(x, draws.normal("redrawn", x), t)
        even = t / (self.shift - (self.shift - 1) * t)  # the time before the shift
        asked, empty = (encode(self.text, some, x.device) for some in (captions, [""] * len(captions)))

        def velocity(x: torch.Tensor, t: torch.Tensor, positive: bool) -> torch.Tensor:
            return self.model(x, t, *(asked if positive else empty)).float()

        guided = flow.guided(velocity, self.cfg)
        for i in range(config.steps):
            now, after = (flow.shift_time(even * (1 - j / config.steps), self.shift) for j in (i, i + 1))
            y = y + (after - now).view(-1, 1, 1, 1) * guided(y, now)
        return torch.where(chosen.view(-1, 1, 1, 1), self.units.denormalise(y).to(others), others)


def require_same_latent(adapter: AdapterConfig, latent: LatentSpec, file: str) -> None:
    """Raise DAVAEError unless an adapter is for latents in these units; it may divide the detail by more."""
    here, there = (torch.tensor(units(spec)) for spec in (adapter.latent, latent))
    shifts = slice(latent.channels)
    if len(here) != len(there) or not torch.allclose(here[shifts], there[shifts], rtol=1e-3, atol=1e-4):
        raise DAVAEError(
            f"{file} is for another DA-VAE: its latents have other channels or units than those of this one; give the "
            "adapter that was trained on it"
        )
