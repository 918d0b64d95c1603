"""The pretrained models a training starts from, out of the files people have."""

from pathlib import Path

from .. import bases
from ..autoencoder import Autoencoder, AutoencoderConfig
from ..checkpoints import metadata
from ..checkpoints.opening import diffusion_model as diffusion_model
from ..checkpoints.opening import open_any
from ..errors import CheckpointError

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
BASE = "base_"  # before the names of the base VAE's tensors in a DA-VAE


def base_vae(path: Path) -> Autoencoder:
    """The VAE in a file or folder of any layout (alone, in a whole checkpoint, of diffusers, under a DA-VAE); in fp32.

    Of a whole checkpoint, and of a DA-VAE, no more than the VAE is read.

    Raises:
        CheckpointError: the file cannot be read or holds no such autoencoder.
    """
    opened = open_any(path)
    if opened.detected.kind == "autoencoder":
        stored = opened.stored.renamed(
            {name.removeprefix(BASE): name for name in opened.stored if name.startswith(BASE)}
        )
        if not any(name.startswith("decoder.") for name in stored):
            raise CheckpointError(
                f"{path.name} is a DA-VAE that was saved without its base VAE's decoder; give the file of that VAE"
            )
    elif "vae" in opened.parts:
        stored = opened.parts["vae"].native
    else:
        raise CheckpointError(
            f"{path.name} holds no VAE that a DA-VAE can be made on: it is {opened.detected.description}"
        )
    state = {name: stored[name].float() for name in stored if name.startswith(VAE_PARTS)}
    try:
        model = Autoencoder(AutoencoderConfig.from_state_dict(state))
        model.load_state_dict(state)
    except (CheckpointError, RuntimeError) as problem:
        told = " ".join(line.strip() for line in str(problem).splitlines()[:3])
        raise CheckpointError(f"{path.name} holds no VAE that a DA-VAE can be made on: {told}") from problem
    return model.eval()


def base_of_file(path: Path, config: AutoencoderConfig, family: str = "") -> bases.Base:
    """Which base model the VAE in a file belongs to: :func:`davae_core.bases.base_of`; a DA-VAE's, by its units."""
    told = dict(open_any(path).told)
    if metadata.kind_of(told) == "autoencoder" and not family:
        latent, _ = metadata.latent_of(metadata.parse(told, "autoencoder", path.name), path.name)
        normalisation = latent.base_shift, latent.base_scale
        known = bases.base_of_latent(config.latent_channels, config.factor, normalisation)
        family = known.name if known else ""
    return bases.base_of(config, family, told)
