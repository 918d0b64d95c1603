"""What ``convert --to diffusers`` puts into its folder; the files of it are written by :mod:`.export`."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from ..adapter import Recommended
from ..autoencoder import AutoencoderConfig
from ..bases import BASES, normalisation_by_shape
from ..davae import DAVAE
from ..errors import CheckpointError
from . import export, metadata, native
from .belonging import base_told, belonging, differing
from .opening import Opened, Part
from .tensors import Tensors

OURS = ("autoencoder", "adapter", "few_step_lora")  # kinds of files that are written whole, not by their parts


def ours(folder: Path, opened: Opened, base: Opened | None) -> dict[str, float]:
    """Write the tensors of a file of :data:`OURS`.

    Args:
        folder: an empty folder.
        opened: the file.
        base: the base VAE of an autoencoder, where it is given.

    Returns:
        How far what was written is from the file, by name, where that is measured.

    Raises:
        CheckpointError: the file is damaged, or the base is not its own or holds no VAE.
    """
    kind, name = opened.detected.kind, opened.path.name
    if kind == "few_step_lora":
        export.few_step_lora(folder, native.load_few_step_lora(opened.path))
        return {}
    if kind == "adapter":
        return {kind: export.adapter(folder, native.load_adapter(opened.path), name)}
    model = native.load_autoencoder(opened.path)
    vae = _own_base(model, opened, base) if base is not None else None
    return {kind: export.autoencoder(folder, model, name, vae)}


def _own_base(model: DAVAE, opened: Opened, base: Opened) -> Tensors:
    """The VAE in ``base``, which has to be the one that a DA-VAE stands on: its encoder makes the base latents."""
    name = opened.path.name
    if "vae" not in base.parts:
        raise CheckpointError(
            f"--base {base.path} is {base.detected.description} and holds no VAE; give the plain VAE that {name} was "
            "trained on"
        )
    vae = base.parts["vae"].native
    encoder = export.base_encoder(model)
    if others := differing(encoder, vae):
        told = belonging(base)
        of = f"the VAE of {told.title} (told by {told.by})" if told.title else "another VAE"
        history = metadata.history_of(opened.told, name)
        own = history.of.get("base_vae") if history else None
        raise CheckpointError(
            f"--base {base.path} is {of}, and not the one that {name} was trained on: {len(others)} of {len(encoder)} "
            f"tensors of the encoder differ, {others[0]} first; give {own.name if own and own.name else 'that one'}"
        )
    return vae


def parts(
    folder: Path, opened: Opened, chosen: Mapping[str, Part], about: Mapping[str, metadata.About], family: str
) -> dict[str, float]:
    """Write diffusion model and VAE, as far as they are ``chosen``; returns as :func:`ours`.

    Args:
        folder: an empty folder.
        opened: the file or folder that they are of.
        chosen: them by name, which is one of :data:`.export.PARTS`.
        about: what is told of each.
        family: the base that a VAE is of; "" leaves it to the file.
    """
    name, differences = opened.path.name, {}
    for key, part in chosen.items():
        if key == "diffusion_model":
            differences[key] = export.transformer(folder, part.native, name, about[key])
            continue
        base = base_told(opened, part, family)
        units = base.normalisation if base else None
        differences[key] = export.vae(folder / export.PARTS[key], part.native, name, units, about[key])
        if base is None:
            _open_question(part)
    return differences


def latent(folder: Path, opened: Opened, about: metadata.About, given: Recommended) -> None:
    """Write the latent of a file that speaks one, with the settings to recommend in ``given`` before its own."""
    kind, name = metadata.kind_of(opened.told), opened.path.name
    spec, own = metadata.latent_of(metadata.parse(opened.told, cast(metadata.Kind, kind), name), name)
    export.latent(folder, spec, metadata.recommended(own, given), about)


def _open_question(part: Part) -> None:
    """Say that the units of a VAE were told by its shapes, which several bases share."""
    config = AutoencoderConfig.from_state_dict(part.native.meta)
    fitting = [base for base in BASES.values() if base.fits(config)]
    if len(fitting) > 1:
        shift, scale = normalisation_by_shape(config)
        print(
            f"  vae: nothing tells whether it is of {' or of '.join(base.title for base in fitting)}; shift {shift:g} "
            f"and scale {scale:g} were written. --family {'|'.join(base.name for base in fitting)} says which it is"
        )
