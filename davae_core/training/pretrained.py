"""The pretrained models a training starts from, out of the files people have."""

from pathlib import Path

from .. import bases
from ..autoencoder import Autoencoder, AutoencoderConfig
from ..checkpoints import files
from ..checkpoints.belonging import belonging
from ..checkpoints.opening import diffusion_model as diffusion_model
from ..checkpoints.opening import open_any
from ..errors import CheckpointError, DAVAEError

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
    """Which base model the VAE in a file belongs to.

    Args:
        path: the file or folder: a VAE alone, in a checkpoint, or a DA-VAE.
        config: its shapes.
        family: the recipe's word for it, a key of :data:`davae_core.bases.BASES`; "" leaves it to the file, see
            :func:`davae_core.checkpoints.belonging.belonging`, and then to the shapes.

    Raises:
        DAVAEError: file and ``family`` contradict each other, nothing tells which of several it is, or what is told
            does not fit the shapes.
    """
    opened = open_any(path)
    told = belonging(opened, config)
    with files.naming(path.name):
        base = bases.base_of(config, family or told.name)
    if told.title and told.name != base.name:
        raise DAVAEError(
            f"{path.name} holds the VAE of {told.title} (told by {told.by}), but --family {base.name} asks for that of "
            f"{base.title}: the same shapes, other units. Give the VAE of {base.title}, or take --family {told.name}, "
            f"or a recipe for {told.title}. If the file is wrong about itself: python -m "
            f"davae_core.checkpoints.convert {path.name} right.safetensors --part vae --family {base.name}"
        )
    return base
