"""A DA-VAE as its training begins: on a base VAE, or out of a trained one; and whether its units are the right ones."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from ... import checkpoints
from ...autoencoder import Autoencoder
from ...bases import BASES, Base, base_of_latent
from ...davae import DAVAE, DAVAEConfig
from ...errors import DAVAEError
from ...latent import LatentSpec
from ..objective import statistics
from ..run.launch import Images

logger = logging.getLogger(__name__)

Units = tuple[float | tuple[float, ...], float | tuple[float, ...]]


@torch.no_grad()
def measured_units(model: DAVAE, images: Images) -> Units:
    """Shift and scale per channel that give the base latents of the images mean 0 and standard deviation 1.

    To six digits, so that a resumed run, which measures again, has the same ones.
    """
    mean, std = statistics(model.to(x.device).encode_base(x) for batch in images() for x in batch.split(1))
    shift, scale = (tuple(float(f"{value:.6g}") for value in values.tolist()) for values in (mean, 1 / std))
    return shift, scale


def on_base(base: Autoencoder, detail_channels: int, scale: int, train_trunk: bool, units: Units = (0.0, 1.0)) -> DAVAE:
    """A DA-VAE whose parts are the base VAE's: encoder and decoder frozen, a second decoder to train.

    Args:
        base: the base VAE.
        detail_channels, scale: D and s.
        train_trunk: give the detail branch a trunk of its own.
        units: shift and scale of the base latent.
    """
    spec = LatentSpec(
        base_channels=base.config.latent_channels,
        detail_channels=detail_channels,
        scale=scale,
        base_factor=base.config.factor,
        base_shift=units[0],
        base_scale=units[1],
    )
    model = DAVAE(DAVAEConfig(base=base.config, latent=spec, shared_trunk=not train_trunk, base_decoder=True))
    own = {f"base_{name}": tensor for name, tensor in base.state_dict().items()}
    decoder = base.decoder.state_dict(prefix="decoder.")
    own |= {n: t for n, t in decoder.items() if not n.startswith("decoder.conv_in.")}
    if not model.config.shared_trunk:
        encoder = base.encoder.state_dict(prefix="detail_trunk.")
        own |= {n: t for n, t in encoder.items() if not n.startswith("detail_trunk.conv_out.")}
    model.load_state_dict(model.state_dict() | own)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("base_"))
    return model


def start_from(model: DAVAE, path: Path, family: Base) -> None:
    """Give ``model`` the weights of a trained DA-VAE, and the units of the base latent that these were trained in; the
    base VAE's weights stay its own. A predictor inside comes along, and is not trained.

    Raises:
        CheckpointError: the file is no DA-VAE.
        DAVAEError: it is a DA-VAE of another shape, on another base VAE, or in the units of another than ``family``.
    """
    trained = checkpoints.load_autoencoder(path, torch.float32)
    if trained.predictor is not None:
        model.config = replace(
            model.config,
            predictor_width=trained.config.predictor_width,
            predictor_blocks=trained.config.predictor_blocks,
        )
        model.predictor = trained.predictor.requires_grad_(False)
    own, new = model.state_dict(), trained.state_dict()
    if trained.base_decoder is None:
        new |= {name: tensor for name, tensor in own.items() if name.startswith(("base_decoder.", "base_post_"))}
    if other := sorted(
        n for n in own.keys() | new.keys() if n not in own or n not in new or own[n].shape != new[n].shape
    ):
        raise DAVAEError(f"{path.name} is a DA-VAE of another shape than this recipe makes; it differs in {other[0]}")
    _check_base(model, trained, path)
    check_family(trained.latent, family, path.name)
    model.load_state_dict({n: own[n] if n.startswith("base_") else new[n] for n in own})
    model.set_base_units(trained.latent.base_shift, trained.latent.base_scale)
    model.set_detail_statistics(trained.latent.detail_mean, trained.latent.detail_std)


def decoder_from(model: DAVAE, path: Path, family: Base) -> None:
    """Give ``model`` the decoder of a trained DA-VAE behind the first block, which goes with the detail and stays new.

    Raises:
        CheckpointError: the file is no DA-VAE.
        DAVAEError: it is on another base VAE, or in the units of another than ``family``.
    """
    trained = checkpoints.load_autoencoder(path, torch.float32)
    _check_base(model, trained, path)
    check_family(trained.latent, family, path.name)
    model.decoder.load_state_dict(trained.decoder.state_dict())
    model.set_base_units(trained.latent.base_shift, trained.latent.base_scale)


def _check_base(model: DAVAE, trained: DAVAE, path: Path) -> None:
    """Raise DAVAEError unless two DA-VAEs stand on the same base VAE; ``path`` is the trained one's file."""
    own, other = (one.base_encoder.state_dict() for one in (model, trained))
    same = {name: tuple(tensor.shape) for name, tensor in own.items()} == {n: tuple(t.shape) for n, t in other.items()}
    if not same or any(not torch.allclose(own[n], other[n], atol=2e-3, rtol=2e-3) for n in own):
        raise DAVAEError(f"{path.name} was made on another base VAE than this recipe's; give the one it was made on")


def check_family(latent: LatentSpec, family: Base, file: str, asked: str = "") -> None:
    """Raise DAVAEError where a DA-VAE's latent has the units of another base model than ``family``.

    Args:
        latent: of the DA-VAE.
        family: the base model that is wanted.
        file: the DA-VAE's, for the message.
        asked: what speaks for it, for the message, in place of ``--family``.
    """
    told, units = _base_in_units(latent), (latent.base_shift, latent.base_scale)
    if told is not None and family.normalisation is not None and told.name != family.name:
        other = "" if asked else f", or take --family {told.name} or a recipe for {told.title}"
        raise DAVAEError(
            f"{file} is a DA-VAE on the VAE of {told.title} (shift {units[0]}, scale {units[1]}), but "
            f"{asked or f'--family {family.name} asks for that of {family.title}'}; give a DA-VAE on the VAE of "
            f"{family.title}{other}"
        )


def check_units(z_base: torch.Tensor, latent: LatentSpec) -> None:
    """Warn where base latents of images look like those of another base model of the same shapes.

    In the right units their standard deviation is about 1: FLUX.1's latents in SD3's units have 4.2, the other way
    round it is 0.24. SD1's and SDXL's are too near each other to be told apart so.

    Args:
        z_base: ``[B, C, h, w]`` in the autoencoder's units.
        latent: the units that are taken for theirs.
    """
    own, std = _base_in_units(latent), z_base.float().std()
    if own is None or own.normalisation is None or bool((own.normalisation[1] * std).log().abs() <= math.log(2)):
        return
    shape = (latent.base_channels, latent.base_factor)
    alike = [base for base in BASES.values() if (base.latent_channels, base.factor) == shape]
    stds = {base.name: base.normalisation[1] * float(std) for base in alike if base.normalisation}
    near = min(stds, key=lambda name: abs(math.log(max(stds[name], 1e-9))))
    if near != own.name:
        logger.warning(
            "the base latents of the first images have standard deviation %.2f in the units of %s, where about 1 is "
            "expected; in those of %s it is %.2f. If the base VAE is that of %s, stop, and begin again with --family "
            "%s: what is trained now fits no diffusion model",
            *(stds[own.name], own.title, BASES[near].title, stds[near], BASES[near].title, near),
        )


def _base_in_units(latent: LatentSpec) -> Base | None:
    return base_of_latent(latent.base_channels, latent.base_factor, (latent.base_shift, latent.base_scale))
