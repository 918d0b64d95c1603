"""The detail of a picture as its half-size latent lets one expect it: base latent to detail latent, in one pass.

Nothing is drawn: where several details would fit, it gives their mean, seen through the losses it was trained with.
Convolutions alone, so any size fits. State-dict names:

    conv_in.*, blocks.N.*, norm_out.*, conv_out.*    the layers of an LDM-layout residual network
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .autoencoder import ResnetBlock
from .errors import CheckpointError, LatentError
from .history import History
from .latent import LatentSpec
from .shapes import dims, number_at, numbered

GROUPS = 32
MOST_BLOCKS = 128  # of a file; the published ones have 6


@dataclass(frozen=True)
class PredictorConfig:
    """Shape of a predictor.

    Attributes:
        latent: the latent whose detail it predicts, with the units of its DA-VAE.
        width: channels inside, a multiple of 32.
        blocks: residual blocks.
    """

    latent: LatentSpec = LatentSpec()
    width: int = 128
    blocks: int = 6

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> "PredictorConfig":
        """Read what the shapes tell: C, D, width and blocks; not scale and units.

        Raises:
            CheckpointError: the names or shapes are not those of a predictor.
        """
        try:
            width, base, _, _ = dims(state, "conv_in.weight", 4)
            detail, _, _, _ = dims(state, "conv_out.weight", 4)
            found = {number_at(name, 1) for name in state if name.startswith("blocks.")}
            blocks = numbered(found, "residual blocks", MOST_BLOCKS)
        except CheckpointError as problem:
            raise CheckpointError(f"not a detail predictor: {problem}") from problem
        if width % GROUPS or not base or detail % base:
            raise CheckpointError(
                f"damaged detail predictor: from {base} to {detail} channels by {width} inside; expected a multiple of "
                f"{base}, and of {GROUPS}"
            )
        return cls(LatentSpec(base_channels=base, detail_channels=detail), width, blocks)


class DetailPredictor(nn.Module):
    """Base latents to detail latents; a new one predicts each channel's mean.

    Args:
        config: its shape, and the units of the latents.

    Attributes:
        history: how its file was made, where that is known.
    """

    history: History | None = None

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_in = nn.Conv2d(config.latent.base_channels, config.width, 3, padding=1)
        self.blocks = nn.ModuleList(ResnetBlock(config.width, config.width) for _ in range(config.blocks))
        self.norm_out = nn.GroupNorm(GROUPS, config.width, eps=1e-6)
        self.conv_out = nn.Conv2d(config.width, config.latent.detail_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    @property
    def latent(self) -> LatentSpec:
        """The latent whose detail is predicted."""
        return self.config.latent

    def forward(self, z_base: torch.Tensor) -> torch.Tensor:
        """``[B, C, h, w]`` to ``[B, D, h, w]``, both in the diffusion model's units."""
        h = self.conv_in(z_base)
        for block in self.blocks:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    @torch.no_grad()
    def complete(self, z_base: torch.Tensor) -> torch.Tensor:
        """An ordinary latent as the base of a picture s times the size, with the detail that it lets one expect.

        Args:
            z_base: ``[B, C, h, w]`` in the base VAE's units.

        Returns:
            ``[B, C + D, h, w]`` in the autoencoder's units; the base channels are those given.

        Raises:
            LatentError: it is not a latent of C channels.
        """
        spec = self.latent
        if z_base.ndim != 4 or z_base.shape[1] != spec.base_channels or not z_base.numel():
            raise LatentError(
                f"base latent has shape {list(z_base.shape)}, expected [batch, {spec.base_channels}, height, width], "
                "none of them 0: the ordinary latent of the picture at "
                f"1/{spec.scale} size, of the VAE that this predictor's DA-VAE stands on"
            )
        weight = self.conv_in.weight
        base = spec.normalise_base(z_base.to(weight.device, torch.float32))
        detail = self(base.to(weight.dtype)).float()
        whole = spec.denormalise(torch.cat([base, detail], dim=1)).to(z_base)
        return torch.cat([z_base, whole[:, spec.base_channels :]], dim=1)


def require_same_latent(predictor: LatentSpec, davae: LatentSpec, file: str, davae_file: str) -> None:
    """Raise LatentError unless a predictor speaks of latents of the shape and the base units of a DA-VAE's."""
    shapes = [(spec.base_channels, spec.detail_channels, spec.factor) for spec in (predictor, davae)]
    if shapes[0] != shapes[1]:
        told = [f"{base} + {detail} channels at 1/{factor}" for base, detail, factor in shapes]
        raise LatentError(
            f"{file} predicts the detail of latents of {told[0]}, the DA-VAE {davae_file} has {told[1]}; choose the "
            "predictor that was trained with this DA-VAE"
        )
    for one, other in ((predictor.base_shift, davae.base_shift), (predictor.base_scale, davae.base_scale)):
        here, there = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
        if not bool(torch.isclose(here, there, rtol=1e-3, atol=1e-5).all()):
            raise LatentError(
                f"{file} predicts the detail of another family's latents (shift {_told(predictor.base_shift)}, scale "
                f"{_told(predictor.base_scale)}), the DA-VAE {davae_file} stands on a base of shift "
                f"{_told(davae.base_shift)}, scale {_told(davae.base_scale)}; choose the predictor that was trained "
                "with this DA-VAE"
            )


def _told(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:g}, ..." if not math.isclose(min(value), max(value)) else f"{value[0]:g}"
    return f"{value:g}"
