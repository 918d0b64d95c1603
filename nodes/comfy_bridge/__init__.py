"""The seam: everything that touches ``comfy.*`` internals, because that is what breaks at updates."""

from comfy.model_patcher import ModelPatcher

from .autoencoder import AutoencoderHandle, load_autoencoder
from .few_steps import apply_few_steps
from .folders import check_file, file_names, file_stamp, register_folders, require_file
from .kept import adapted
from .latent_format import require_channels
from .masking import keep_base
from .merged import load_merged
from .predictor import KIND as PREDICTORS
from .predictor import predict_detail
from .previews import install_previews
from .rebuild import apply_adapter
from .sampling import Settings, latent_spec, sample, sampler_names, scheduler_names
from .tiny import load_tiny, tiny_stamp
from .tiny_decoder import FOLDER as DECODERS
from .tiny_decoder import decode_fast, decoder_names
from .versions import empty, node_schema

__all__ = [
    "DECODERS",
    "PREDICTORS",
    "AutoencoderHandle",
    "ModelPatcher",
    "Settings",
    "adapted",
    "apply_adapter",
    "apply_few_steps",
    "check_file",
    "decode_fast",
    "decoder_names",
    "empty",
    "file_names",
    "file_stamp",
    "install_previews",
    "keep_base",
    "latent_spec",
    "load_autoencoder",
    "load_merged",
    "load_tiny",
    "node_schema",
    "predict_detail",
    "register_folders",
    "require_channels",
    "require_file",
    "sample",
    "sampler_names",
    "scheduler_names",
    "tiny_stamp",
]
