"""Know a model again by its file, in whatever layout it lies: see :mod:`davae_core.history`."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..history import Identity, Role, identity
from .opening import open_any

_PARTS: Mapping[str, str] = {"base_vae": "vae", "base_model": "diffusion_model"}


def identify(path: str | os.PathLike[str], role: Role) -> Identity:
    """The model in a file or folder as something that a trained file belongs to, named by the file.

    Args:
        path: of any layout that ``convert`` reads; only a few tensors are read.
        role: what it is to the trained file; a file to ``start`` from is known by its name alone.

    Raises:
        CheckpointError: it cannot be read, or holds no model of that role.
    """
    path = Path(path)
    if role == "start":
        return Identity(path.name)
    opened = open_any(path, most=0)
    state: Mapping[str, torch.Tensor] | None = None
    if opened.detected.kind == "autoencoder" and role in ("base_vae", "davae"):
        state = opened.stored
    elif part := opened.parts.get(_PARTS.get(role, "")):
        state = part.native
    if state is None:
        raise CheckpointError(f"{path.name} is {opened.detected.description}, which cannot be the {role} of a file")
    return identity(role, state, path.name)
