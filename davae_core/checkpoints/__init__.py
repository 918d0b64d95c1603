"""Files: detect, load, save. Only safetensors; a save is whole or not at all."""

from .detect import Detected, detect
from .identify import identify
from .native import (
    MergedModel,
    load_adapter,
    load_autoencoder,
    load_few_step_lora,
    load_merged,
    load_predictor,
    load_text_encoder,
    load_tiny_decoder,
    save_adapter,
    save_autoencoder,
    save_few_step_lora,
    save_merged,
    save_predictor,
    save_text_encoder,
    save_tiny_decoder,
    tiny_decoder_config,
)

__all__ = [
    "Detected",
    "MergedModel",
    "detect",
    "identify",
    "load_adapter",
    "load_autoencoder",
    "load_few_step_lora",
    "load_merged",
    "load_predictor",
    "load_text_encoder",
    "load_tiny_decoder",
    "save_adapter",
    "save_autoencoder",
    "save_few_step_lora",
    "save_merged",
    "save_predictor",
    "save_text_encoder",
    "save_tiny_decoder",
    "tiny_decoder_config",
]
