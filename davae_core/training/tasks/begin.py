"""A DA-VAE as its training begins: on a base VAE, or out of a trained one."""

from pathlib import Path

import torch

from ... import checkpoints
from ...autoencoder import Autoencoder
from ...davae import DAVAE, DAVAEConfig
from ...errors import DAVAEError
from ...latent import LatentSpec

Units = tuple[float | tuple[float, ...], float | tuple[float, ...]]


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


def start_from(model: DAVAE, path: Path) -> None:
    """Give ``model`` the weights of a trained DA-VAE, and the units of the base latent that these were trained in; the
    base VAE's weights stay its own.

    Raises:
        CheckpointError: the file is no DA-VAE.
        DAVAEError: it is a DA-VAE of another shape or on another base VAE.
    """
    trained = checkpoints.load_autoencoder(path, torch.float32)
    own, new = model.state_dict(), trained.state_dict()
    if trained.base_decoder is None:
        new |= {name: tensor for name, tensor in own.items() if name.startswith(("base_decoder.", "base_post_"))}
    if other := sorted(
        n for n in own.keys() | new.keys() if n not in own or n not in new or own[n].shape != new[n].shape
    ):
        raise DAVAEError(f"{path.name} is a DA-VAE of another shape than this recipe makes; it differs in {other[0]}")
    if any(not torch.allclose(own[n], new[n], atol=2e-3, rtol=2e-3) for n in own if n.startswith("base_encoder.")):
        raise DAVAEError(f"{path.name} was made on another base VAE than this recipe's; give the one it was made on")
    model.load_state_dict({n: own[n] if n.startswith("base_") else new[n] for n in own})
    model.set_base_units(trained.latent.base_shift, trained.latent.base_scale)
    model.set_detail_statistics(trained.latent.detail_mean, trained.latent.detail_std)
