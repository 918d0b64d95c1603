"""Detail predictors under ComfyUI's memory management."""

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...davae_core import checkpoints
from ...davae_core.errors import LatentError
from ...davae_core.latent import with_zero_detail
from ...davae_core.memory import MARGIN
from ...davae_core.predictor import DetailPredictor, require_same_latent
from .autoencoder import AutoencoderHandle, check_interrupt
from .folders import file_stamp, require_file
from .history import note_predictor
from .versions import intermediate_dtype

KIND = "latent_upscale_models"

# On the DA-VAE's own patcher: the last predictor that it was used with, which goes with it.
_KEPT = "davae_predictor"

# A block's input, norm and convolution, and what the kernels take: 5 to 8.3 maps of the network's width were measured.
_HELD = 8


def predict_detail(davae: AutoencoderHandle, name: str, z_base: torch.Tensor) -> torch.Tensor:
    """An ordinary latent as the base of a picture s times the size, with the detail that it lets one expect.

    Args:
        davae: what the latent will be decoded with.
        name: a file in models/latent_upscale_models.
        z_base: ``[B, C, h, w]`` in the base VAE's units.

    Returns:
        ``[B, C + D, h, w]``; the base channels are those given, to the bit.

    Raises:
        CheckpointError: the file is missing or cannot be read.
        LatentError: it predicts the detail of another kind of latent, the DA-VAE predicts its detail itself, or the
            latent is not of C channels.
    """
    z = with_zero_detail(z_base, davae.latent)
    if davae.model.predictor is not None:
        raise LatentError(
            f"the DA-VAE {davae.name} has a predictor inside, which expects the detail of any base by itself: leave "
            "this node out, and put Base to DA-VAE Latent in its place"
        )
    patcher = _patcher(davae, name)
    model: DetailPredictor = patcher.model
    require_same_latent(model.latent, davae.latent, name, davae.name)
    note_predictor(model.history, name, davae.model, davae.name)
    management = comfy.model_management
    batch, channels, height, width = z_base.shape
    need = round(MARGIN * _HELD * model.config.width * height * width * davae.dtype.itemsize)
    management.load_models_gpu([patcher], memory_required=need, force_full_load=True)
    for i in range(batch):
        check_interrupt()
        whole = model.complete(z_base[i : i + 1].to(patcher.load_device, torch.float32))
        z[i : i + 1, channels:] = whole[:, channels:].to(z)
    return z.to(management.intermediate_device(), intermediate_dtype())


def _patcher(davae: AutoencoderHandle, name: str) -> ModelPatcher:
    """The predictor in the precision of the DA-VAE; the same object as the last time for the same file."""
    path, state = require_file(KIND, name), (name, file_stamp(KIND, name))
    kept: tuple[tuple, ModelPatcher] | None = vars(davae.patcher).get(_KEPT)
    if kept is None or kept[0] != state:
        vars(davae.patcher).pop(_KEPT, None)
        model = checkpoints.load_predictor(path, davae.dtype).requires_grad_(False)
        load, offload = davae.patcher.load_device, davae.patcher.offload_device
        kept = (state, ModelPatcher(model.to(offload), load_device=load, offload_device=offload))
        vars(davae.patcher)[_KEPT] = kept
    return kept[1]
