"""The three layouts of base VAEs at reduced width: every layer of the true one, with few channels."""

from __future__ import annotations

import torch

from davae_core.autoencoder import Autoencoder, AutoencoderConfig

# A quarter of the true widths, and at s = 2 the detail channels that the paper has or would have (r = 1, 1, 3).
LAYOUTS = {
    "sd3": AutoencoderConfig((32, 64, 128, 128), 2),
    "sd1": AutoencoderConfig((32, 64, 128, 128), 2, latent_channels=4, quant_conv=True),
    "vavae": AutoencoderConfig((32, 32, 64, 64, 128), 2, latent_channels=32, quant_conv=True, attention=(4,)),
}
DETAIL = {"sd3": 16, "sd1": 4, "vavae": 96}


def random_vae(layout: str, seed: int = 0) -> Autoencoder:
    """A VAE whose random weights show a layer that is left out or misplaced: none of them starts as the identity."""
    torch.manual_seed(seed)
    model = Autoencoder(LAYOUTS[layout]).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                torch.nn.init.normal_(module.weight, 1.0, 0.2)
                torch.nn.init.normal_(module.bias, 0.0, 0.2)
    return model
