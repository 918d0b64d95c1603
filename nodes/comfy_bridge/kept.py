"""Adapted models that are kept as long as the MODEL they were made from, so that a new seed makes none anew."""

from comfy.model_patcher import ModelPatcher

from ...davae_core import checkpoints
from .folders import file_stamp, require_file
from .rebuild import apply_adapter

# Kept on the patcher itself, not in a table beside it: the adapted model refers to the patcher, so a table would keep
# both for ever, and as it is they go together. A clone of the patcher begins without.
_KEPT = "davae_adapted"


def adapted(base: ModelPatcher, name: str) -> ModelPatcher:
    """The MODEL with an adapter of models/loras applied at full strength.

    The same object as the last time for the same file and MODEL, and a new one when either has changed.

    Raises:
        DAVAEError: see :func:`apply_adapter`.
        CheckpointError: the file is missing or cannot be read.
    """
    path = require_file("loras", name)
    state = (file_stamp("loras", name), base.patches_uuid)
    kept: dict[str, tuple[tuple, ModelPatcher]] = vars(base).setdefault(_KEPT, {})
    if name not in kept or kept[name][0] != state:
        kept.pop(name, None)
        kept[name] = (state, apply_adapter(base, checkpoints.load_adapter(path), 1.0, name))
    return kept[name][1]
