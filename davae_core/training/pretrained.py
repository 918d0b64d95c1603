"""The pretrained models a training starts from, out of the files people have."""

from pathlib import Path

from .. import bases
from ..autoencoder import Autoencoder, AutoencoderConfig
from ..checkpoints.opening import diffusion_model as diffusion_model
from ..checkpoints.opening import open_any
from ..errors import CheckpointError

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def base_vae(path: Path) -> Autoencoder:
    """The VAE in a file or folder of any layout (alone, in a whole checkpoint, of diffusers); in fp32.

    Of a whole checkpoint no more than the VAE is read.

    Raises:
        CheckpointError: the file cannot be read or holds no such autoencoder.
    """
    opened = open_any(path)
    if "vae" not in opened.parts:
        raise CheckpointError(
            f"{path.name} holds no VAE that a DA-VAE can be made on: it is {opened.detected.description}"
        )
    stored = opened.parts["vae"].native
    state = {name: stored[name].float() for name in stored if name.startswith(VAE_PARTS)}
    try:
        model = Autoencoder(AutoencoderConfig.from_state_dict(state))
        model.load_state_dict(state)
    except (CheckpointError, RuntimeError) as problem:
        told = " ".join(line.strip() for line in str(problem).splitlines()[:3])
        raise CheckpointError(f"{path.name} holds no VAE that a DA-VAE can be made on: {told}") from problem
    return model.eval()


def base_of_file(path: Path, config: AutoencoderConfig, family: str = "") -> bases.Base:
    """Which base model the VAE in a file belongs to, see :func:`davae_core.bases.base_of`."""
    return bases.base_of(config, family, dict(open_any(path).told))
