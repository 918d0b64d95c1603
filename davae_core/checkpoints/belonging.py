"""Which base model the VAE in a file or folder is of, as far as the file tells: several bases have the same shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch

from .. import bases
from ..autoencoder import AutoencoderConfig
from ..davae import DAVAEConfig
from ..errors import DAVAEError
from . import files, metadata
from .opening import Opened, Part

WITH_LATENT = ("autoencoder", "adapter", "few_step_lora", "model", "predictor", "tiny_decoder")
HALF, TINY = 2**-7, 1e-6  # twice what bfloat16 rounds away, and what float16 keeps few digits of


@dataclass(frozen=True)
class Belonging:
    """What a file tells of its VAE's base model.

    Attributes:
        name: a key of :data:`davae_core.bases.BASES`; "" where it tells none.
        by: what tells it, for messages.
    """

    name: str = ""
    by: str = ""

    @property
    def title(self) -> str:
        """The base model for people, "" for none."""
        return bases.BASES[self.name].title if self.name in bases.BASES else ""


def belonging(opened: Opened, config: AutoencoderConfig | None = None) -> Belonging:
    """Which base model the VAE in ``opened`` is of: by its units (DA-VAEs and what is made for them), its metadata, the
    diffusion model beside it, or its name, whichever comes first.

    Args:
        opened: a file or folder.
        config: the VAE's shapes; read where not given.

    Raises:
        CheckpointError: it holds a VAE or a configuration that is damaged.
    """
    file, kind = opened.path.name, metadata.kind_of(opened.told)
    if kind in WITH_LATENT:
        latent, _ = metadata.latent_of(metadata.parse(opened.told, cast(metadata.Kind, kind), file), file)
        units = latent.base_shift, latent.base_scale
        known = bases.base_of_latent(latent.base_channels, latent.base_factor, units)
        return Belonging(known.name, "the units of its latent") if known else Belonging()
    if named := bases.base_named(opened.told):
        return Belonging(named, "its metadata")
    config = config or vae_shape(opened)
    if config is None:
        return Belonging()
    if opened.detected.kind == "sd3 checkpoint" and bases.SD3.fits(config):
        return Belonging(bases.SD3.name, "the diffusion model beside it")
    named = bases.base_by_file_name(config, file)
    return Belonging(named, "its name") if named else Belonging()


def vae_shape(opened: Opened) -> AutoencoderConfig | None:
    """The shape of the plain VAE in a file or folder, or of a DA-VAE's base; None where there is no sound one."""
    try:
        if opened.detected.kind == "autoencoder":
            return DAVAEConfig.from_state_dict(opened.stored.meta).base
        if "vae" in opened.parts:
            return AutoencoderConfig.from_state_dict(opened.parts["vae"].native.meta)
    except DAVAEError:
        pass
    return None


def base_told(opened: Opened, part: Part, family: str = "") -> bases.Base | None:
    """The base that the plain VAE ``part`` of ``opened`` is said to be of, by ``family`` or by its file; None where
    nobody says.

    Raises:
        DAVAEError: the VAE is damaged, or is not of the base that is named.
    """
    with files.naming(part.file):
        config = AutoencoderConfig.from_state_dict(part.native.meta)
        named = family or belonging(opened, config).name
        return bases.base_of(config, named) if named else None


def differing(encoder: Mapping[str, torch.Tensor], vae: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors of ``encoder`` that ``vae`` does not have, or has with other values, half precision aside."""

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=HALF, atol=TINY)

    return [name for name, tensor in encoder.items() if name not in vae or not same(tensor, vae[name])]
