"""Name the layer that a picture of NaN comes from; looking at all weights when they are loaded would take seconds."""

import logging

import torch

_LOOKED_AT = (torch.float32, torch.bfloat16, torch.float16)


def note_nan(network: torch.nn.Module, latent: torch.Tensor) -> None:
    """Say in the log where NaN or infinity in a sampled latent can come from.

    Args:
        network: the diffusion model.
        latent: as it was sampled.
    """
    if bool(torch.isfinite(latent).all()):
        return
    name = next(
        (
            name
            for name, tensor in network.state_dict().items()
            if tensor.dtype in _LOOKED_AT and not tensor.is_meta and not bool(torch.isfinite(tensor).all())
        ),
        None,
    )
    if name is None:
        logging.warning(
            "DA-VAE: sampling gave values that are not numbers (NaN), though the MODEL's weights are all finite. Start "
            "ComfyUI with --force-fp32 or load the model in bf16; fp16 may overflow"
        )
    else:
        logging.warning(
            "DA-VAE: sampling gave values that are not numbers (NaN): the MODEL's layer %s holds such values, so its "
            "file or a LoRA on it is damaged. Load another copy",
            name,
        )
