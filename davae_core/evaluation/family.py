"""A family of models, ready to draw: base model, text, DA-VAE, and the adapter merged into a second model."""

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import checkpoints, prompts, tiny
from ..adapter import Recommended, merge
from ..checkpoints import files
from ..checkpoints.opening import diffusion_model
from ..davae import DAVAE
from ..embeddings import Embeddings, Encoded
from ..errors import CheckpointError, DAVAEError
from ..latent import LatentSpec
from ..mmdit import MMDiT, MMDiTConfig
from ..text_encoder import TextEncoder


@dataclass(frozen=True)
class FamilyFiles:
    """Where the models of a family are; by default those that ship.

    Attributes:
        model: the base diffusion model: its file, a whole checkpoint, or a folder of diffusers' layout.
        autoencoder: file of the DA-VAE.
        adapter: file of the adapter.
        text_encoder: file of a tiny model's text encoder; None where there are embeddings.
        embeddings: folder of the captions' embeddings (``python -m davae_core.training text``).
        few_steps: file of a few-step LoRA on the adapted model; None for none.
    """

    model: Path = tiny.FOLDERS["diffusion_models"] / tiny.MODEL
    autoencoder: Path = tiny.FOLDERS["vae"] / tiny.AUTOENCODER
    adapter: Path = tiny.FOLDERS["loras"] / tiny.ADAPTER
    text_encoder: Path | None = tiny.FOLDERS["text_encoders"] / tiny.TEXT_ENCODER
    embeddings: Path | None = None
    few_steps: Path | None = None

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file by its role, to tell which weights figures were measured with; folders are left out."""
        return {role: hashed(path) for role, path in vars(self).items() if path is not None and path.is_file()}


def hashed(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def add_arguments(parser: ArgumentParser) -> None:
    """``--model``, ``--autoencoder``, ``--adapter``, and ``--text-encoder`` or ``--embeddings``."""
    group = parser.add_argument_group("models", "any family, by file; what is not given is that of the tiny family")
    group.add_argument(
        "--model", type=Path, metavar="FILE", help="base diffusion model, a checkpoint with it, or a diffusers folder"
    )
    group.add_argument("--autoencoder", type=Path, metavar="FILE", help="DA-VAE")
    group.add_argument("--adapter", type=Path, metavar="FILE", help="adapter")
    group.add_argument("--few-steps", type=Path, metavar="FILE", help="few-step LoRA on the adapted model")
    group.add_argument("--text-encoder", type=Path, metavar="FILE", help="text encoder of a tiny model")
    group.add_argument(
        "--embeddings", type=Path, metavar="DIR", help="embeddings of all captions (python -m davae_core.training text)"
    )


def files_of(args: Namespace) -> FamilyFiles:
    """The files that a command line names.

    Raises:
        DAVAEError: captions are to be encoded in two ways.
    """
    if args.text_encoder is not None and args.embeddings is not None:
        raise DAVAEError("give --text-encoder or --embeddings, not both: captions are encoded by one of them")
    given = {name: getattr(args, name) for name in ROLES}
    named = {name: path for name, path in given.items() if path is not None}
    if args.embeddings is not None:
        named["text_encoder"] = None
    return FamilyFiles(**named)


ROLES = ("model", "autoencoder", "adapter", "text_encoder", "embeddings", "few_steps")


@dataclass(frozen=True)
class Family:
    """Models that belong together, in float32 and eval mode on one device.

    Attributes:
        base: the unadapted model, C channels.
        adapted: the same with the adapter merged into it, C + D channels.
        text: what captions of both are encoded by.
        davae: the autoencoder.
        latent: units of the latents as the adapter was trained with them.
        recommended: how the adapter is to be sampled.
    """

    base: MMDiT
    adapted: MMDiT
    text: TextEncoder | Embeddings
    davae: DAVAE
    latent: LatentSpec
    recommended: Recommended

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.davae.decoder.conv_out.weight.device

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Captions as both models read them.

        Raises:
            DAVAEError: a caption has no embedding.
        """
        return prompts.encode(self.text, captions, self.device)


def load_davae(path: Path, device: torch.device | str = "cpu") -> DAVAE:
    """A DA-VAE in float32, without gradients.

    Raises:
        CheckpointError: the file is not that of a DA-VAE.
    """
    return checkpoints.load_autoencoder(path, torch.float32).requires_grad_(False).to(device)


def load_family(where: FamilyFiles = FamilyFiles(), device: torch.device | str = "cpu") -> Family:
    """Load the models and merge the adapter.

    Raises:
        DAVAEError: a file is missing or damaged, or they do not belong together.
    """
    adapter = checkpoints.load_adapter(where.adapter)
    davae = load_davae(where.autoencoder, device)
    text = prompts.source(where.text_encoder, where.embeddings)
    if isinstance(text, TextEncoder):
        text = text.to(device)
    latent = adapter.config.latent
    if (latent.channels, latent.factor) != (davae.latent.channels, davae.latent.factor):
        raise DAVAEError(
            f"{where.adapter.name} is for latents of {latent.channels} channels at 1/{latent.factor}, "
            f"{where.autoencoder.name} makes {davae.latent.channels} channels at 1/{davae.latent.factor}; use files "
            "that belong together"
        )
    state = {name: tensor.float() for name, tensor in diffusion_model(where.model).items()}
    files.check_finite(state, where.model.name)
    base = _model(state, where.model.name)
    widths = (text.config.context, text.config.pooled) if isinstance(text, TextEncoder) else (text.context, text.pooled)
    if (base.config.context, base.config.pooled) != widths:
        raise DAVAEError(
            f"{where.model.name} reads text of width {base.config.context} and {base.config.pooled} (pooled), "
            f"{(where.text_encoder or where.embeddings or Path()).name} gives {widths[0]} and {widths[1]}; use files "
            "that belong together (--text-encoder or --embeddings)"
        )
    merged, recommended = merge(state, adapter), adapter.config.recommended
    if where.few_steps is not None:
        lora = checkpoints.load_few_step_lora(where.few_steps)
        if (lora.hidden, lora.latent.channels) != (adapter.config.hidden, latent.channels):
            raise DAVAEError(
                f"{where.few_steps.name} is for a model of width {lora.hidden} and {lora.latent.channels} channels, "
                f"the adapted one has {adapter.config.hidden} and {latent.channels}; use files that belong together"
            )
        merged, recommended = lora.added(merged), replace(lora.recommended, size=recommended.size)
    adapted = _model(merged, where.adapter.name)
    return Family(base.to(device), adapted.to(device), text, davae, latent, recommended)


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
