"""The tiny models: where their files are. Inference never needs more than this."""

from pathlib import Path

MODEL = "davae_tiny_sd35.safetensors"
TEXT_ENCODER = "davae_tiny_text_encoder.safetensors"
BASE_AUTOENCODER = "base_autoencoder.safetensors"
AUTOENCODER = "davae_tiny_autoencoder.safetensors"
PREDICTOR = "davae_tiny_predictor.safetensors"
DECODER = "davae_tiny_decoder.safetensors"
ADAPTER = "davae_tiny_adapter.safetensors"
FEW_STEPS = "davae_tiny_few_steps.safetensors"

# Metadata of the model file: the colours of its latent, as in LatentSpec.preview.
PREVIEW = "davae.preview"

_HERE = Path(__file__).parent

# ComfyUI's model kinds, and the folder here that holds files of each.
_KINDS = ("diffusion_models", "text_encoders", "vae", "loras", "latent_upscale_models", "vae_approx")
FOLDERS = {kind: _HERE / kind for kind in _KINDS}
