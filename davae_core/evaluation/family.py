"""The tiny family, ready to draw: base model, text encoder, DA-VAE, and the adapter merged into a second model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import checkpoints, tiny
from ..adapter import Recommended, merge
from ..checkpoints import files
from ..davae import DAVAE
from ..errors import CheckpointError, DAVAEError
from ..latent import LatentSpec
from ..mmdit import MMDiT, MMDiTConfig
from ..text_encoder import TextEncoder

# File -> ComfyUI's model kind, which is the name of its folder.
FILES = {
    tiny.MODEL: "diffusion_models",
    tiny.TEXT_ENCODER: "text_encoders",
    tiny.AUTOENCODER: "vae",
    tiny.ADAPTER: "loras",
}


@dataclass(frozen=True)
class Family:
    """Models that belong together, in float32 and eval mode on one device.

    Attributes:
        base: the unadapted model, C channels.
        adapted: the same with the adapter merged into it, C + D channels.
        text: the text encoder of both.
        davae: the autoencoder.
        latent: units of the latents as the adapter was trained with them.
        recommended: how the adapter is to be sampled.
    """

    base: MMDiT
    adapted: MMDiT
    text: TextEncoder
    davae: DAVAE
    latent: LatentSpec
    recommended: Recommended

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.text.position_embedding.device


def find_files(folder: Path | None = None, names: Sequence[str] = tuple(FILES)) -> dict[str, Path]:
    """Where the files of a tiny family are.

    Args:
        folder: holds the files, all in one place or in the sub-folders ``diffusion_models``, ``text_encoders``,
            ``vae`` and ``loras``; without one they are those of the pack.
        names: keys of :data:`FILES` that are wanted.

    Raises:
        DAVAEError: one of them is missing.
    """
    found, missing = {}, []
    for name in names:
        kind = FILES[name]
        places = [tiny.FOLDERS[kind] / name] if folder is None else [folder / kind / name, folder / name]
        there = [place for place in places if place.is_file()]
        if there:
            found[name] = there[0]
        else:
            missing.append(name)
    if missing:
        where = "the pack" if folder is None else f"{folder} and its sub-folders {', '.join(FILES.values())}"
        raise DAVAEError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in {where}; give a folder that holds the "
            "files as --folder, or train them: python -m davae_core.training.tiny.build --help"
        )
    return found


def load_davae(path: Path, device: torch.device | str = "cpu") -> DAVAE:
    """A DA-VAE in float32, without gradients.

    Raises:
        CheckpointError: the file is not that of a DA-VAE.
    """
    return checkpoints.load_autoencoder(path, torch.float32).requires_grad_(False).to(device)


def load_family(folder: Path | None = None, device: torch.device | str = "cpu") -> Family:
    """Load the four files, see :func:`find_files`, and merge the adapter.

    Raises:
        DAVAEError: a file is missing or damaged, or they do not belong together.
    """
    paths = find_files(folder)
    state = _float(files.read(paths[tiny.MODEL])[0])
    files.check_finite(state, tiny.MODEL)
    adapter = checkpoints.load_adapter(paths[tiny.ADAPTER])
    davae = load_davae(paths[tiny.AUTOENCODER], device)
    text = checkpoints.load_text_encoder(paths[tiny.TEXT_ENCODER]).float().requires_grad_(False).to(device)
    latent = adapter.config.latent
    if (latent.channels, latent.factor) != (davae.latent.channels, davae.latent.factor):
        raise DAVAEError(
            f"{tiny.ADAPTER} is for latents of {latent.channels} channels at 1/{latent.factor}, {tiny.AUTOENCODER} "
            f"makes {davae.latent.channels} channels at 1/{davae.latent.factor}; use files that belong together"
        )
    base = _model(state, tiny.MODEL)
    if (base.config.context, base.config.pooled) != (text.config.context, text.config.pooled):
        raise DAVAEError(
            f"{tiny.MODEL} reads text of width {base.config.context} and {base.config.pooled} (pooled), "
            f"{tiny.TEXT_ENCODER} gives {text.config.context} and {text.config.pooled}; use files that belong together"
        )
    adapted = _model(merge(state, adapter), tiny.ADAPTER)
    return Family(base.to(device), adapted.to(device), text, davae, latent, adapter.config.recommended)


def hashes(paths: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of each file, to tell which weights figures were measured with."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def _float(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in state.items()}


def _model(state: dict[str, torch.Tensor], name: str) -> MMDiT:
    """An MMDiT that shares the tensors of ``state``."""
    try:
        with torch.device("meta"):
            model = MMDiT(MMDiTConfig.from_state_dict(state))
        model.load_state_dict(state, assign=True)
    except RuntimeError as problem:
        said = " ".join(line.strip() for line in str(problem).splitlines()[1:3])
        raise CheckpointError(f"{name} does not hold the tensors of an SD3.5 diffusion model: {said}") from problem
    except CheckpointError as problem:
        raise CheckpointError(f"{name}: {problem}") from problem
    return model.requires_grad_(False).eval()
