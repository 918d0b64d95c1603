"""Put a predictor inside a DA-VAE: its latents then hold what the predictor does not expect of the detail.

    python -m davae_core.training residual --autoencoder davae.safetensors --predictor predictor.safetensors \\
        --data.images photos --data.size 1024 --out davae_residual.safetensors

Encoder and decoder stay as they are, and so does what they make of a picture; the latent in between is another, for
which adapters, tiny decoders and few-step LoRAs have to be trained anew. The images give the statistics of its detail.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from .. import checkpoints, devices
from ..adapter import Recommended
from ..davae import DAVAE
from ..errors import DAVAEError
from ..history import History, Identity, Role, mismatch
from ..predictor import DetailPredictor, require_same_latent
from .data import survey
from .data.config import DataConfig
from .objective import statistics
from .run.launch import measured
from .tasks import pieces

USELESS = 1.1  # so much of the variance left is more than there was

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResidualConfig:
    """Which DA-VAE, which predictor, which images, and where the file goes."""

    data: DataConfig
    autoencoder: Path
    """File of the DA-VAE."""
    predictor: Path
    """File of the predictor that was trained with it."""
    out: Path
    """The file that is written."""
    device: str = "auto"
    """Device to compute on; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class Expected:
    """What a predictor knows of a detail.

    Attributes:
        left: share of the variance of the detail that it leaves, mean of the channels.
        largest: of the channel that it knows least of.
    """

    left: float
    largest: float


@torch.no_grad()
def put_inside(davae: DAVAE, predictor: DetailPredictor, images: Iterable[torch.Tensor]) -> Expected:
    """Put a predictor inside a DA-VAE and measure the statistics of its latent anew.

    Args:
        davae: is changed.
        predictor: for its latents.
        images: ``[B, 3, H, W]`` in [-1, 1].

    Raises:
        DAVAEError: see :meth:`DAVAE.set_predictor`; or the predictor knows nothing of the detail of these images.
    """
    before = davae.latent
    davae.set_predictor(predictor)
    details = (pieces.encode(davae, x)[:, before.base_channels :].float() for batch in images for x in batch.split(1))
    mean, std = statistics(details)
    left = (std / std.new_tensor(before.detail_std)).square()
    if not float(left.mean()) <= USELESS:
        raise DAVAEError(
            f"the predictor leaves {float(left.mean()):.0%} of the detail's variance in these images: it was trained "
            "with another DA-VAE, or for images of another kind"
        )
    davae.set_detail_statistics(mean.tolist(), std.tolist())
    return Expected(float(left.mean()), float(left.max()))


def write(config: ResidualConfig) -> Expected:
    """Write the file.

    Raises:
        DAVAEError: the two files do not belong together, or the images cannot be read.
    """
    device = devices.device(config.device)
    davae = checkpoints.load_autoencoder(config.autoencoder, torch.float32).requires_grad_(False).to(device)
    predictor = checkpoints.load_predictor(config.predictor, torch.float32).to(device)
    if words := mismatch(predictor.history, "davae", davae.state_dict()):
        raise DAVAEError(
            f"{config.predictor.name} was {words}: {config.autoencoder.name}; give the DA-VAE that it was trained with"
        )
    require_same_latent(predictor.latent, davae.latent, config.predictor.name, config.autoencoder.name)
    of: dict[Role, Identity] = {"start": Identity(config.autoencoder.name)}
    found = survey.collect(config.data, davae.latent.factor)
    logger.info("%s", found.table)
    images = partial(measured, config.data, 0, davae.latent.factor, device, found)
    told = put_inside(davae, predictor, images())
    recommended = Recommended(size=config.data.size)
    checkpoints.save_autoencoder(config.out, davae.cpu(), recommended, history=History(of=of))
    logger.info(
        "%s: of the detail's variance %.1f %% is left to the latent (%.1f %% in the channel with most)",
        config.out,
        100 * told.left,
        100 * told.largest,
    )
    return told


def main(args: list[str] | None = None) -> int:
    """Put a predictor inside a DA-VAE from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(tyro.cli(ResidualConfig, description=__doc__, args=args, prog="python -m davae_core.training residual"))
    return 0
