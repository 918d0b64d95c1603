"""The seam: everything that touches ``comfy.*`` internals, because that is what breaks at updates."""

from .autoencoder import AutoencoderHandle, load_autoencoder
from .folders import check_file, file_stamp, register_folders, require_file
from .merged import load_merged
from .rebuild import apply_adapter
from .sampling import Settings, latent_spec, sample
from .tiny import load_tiny
from .versions import node_schema

__all__ = [
    "AutoencoderHandle",
    "Settings",
    "apply_adapter",
    "check_file",
    "file_stamp",
    "latent_spec",
    "load_autoencoder",
    "load_merged",
    "load_tiny",
    "node_schema",
    "register_folders",
    "require_file",
    "sample",
]
