"""Our networks against ComfyUI's own, on the same random weights in the true layouts, in float32."""

from __future__ import annotations

import pytest
import torch

from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.mmdit import MMDiT, MMDiTConfig

TOLERANCE = 1e-4


def random_state(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights larger than at initialisation, so that a misplaced one shows; norms' factors stay around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) * (0.3 if value.ndim == 1 else value[0].numel() ** -0.5)
        + (1.0 if ".ln_" in name or ("norm" in name and name.endswith("weight")) else 0.0)
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("size", [(8, 12), (7, 9)], ids=["whole patches", "odd size"])
@pytest.mark.parametrize(
    "config",
    [
        MMDiTConfig(hidden=256, depth=4, grid=16, context=96, pooled=64, dual_attention=(0, 1)),
        MMDiTConfig(hidden=256, depth=4, grid=16, context=96, pooled=64, dual_attention=()),
        MMDiTConfig(hidden=128, depth=2, grid=16, context=96, pooled=64, dual_attention=(), qk_norm=False),
        MMDiTConfig(
            hidden=128, depth=2, in_channels=32, out_channels=32, grid=16, context=96, pooled=64, dual_attention=(0,)
        ),
    ],
    ids=["SD3.5-medium", "SD3.5-large", "SD3", "32 channels"],
)
@torch.inference_mode()
def test_our_mmdit_is_comfyuis(comfy, config, size):
    import comfy.ops
    from comfy import model_detection
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    ours = MMDiT(config).eval()
    state = random_state(ours, seed=1)
    ours.load_state_dict(state)
    theirs = OpenAISignatureMMDITWrapper(
        **model_detection.detect_unet_config(state, ""), device="cpu", dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    theirs.load_state_dict(state)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, config.in_channels, *size, generator=generator)
    context, pooled = torch.randn(2, 11, 96, generator=generator), torch.randn(2, 64, generator=generator)
    t = torch.tensor([0.3, 0.9])
    expected = theirs(x, 1000 * t, context=context, y=pooled)
    assert expected.std() > 0.1
    assert (ours(x, t, context, pooled) - expected).abs().max() <= TOLERANCE


@torch.inference_mode()
def test_our_autoencoder_is_comfyuis_sd3_vae(comfy):
    import comfy.sd

    ours = Autoencoder(AutoencoderConfig()).eval()
    state = random_state(ours, seed=3)
    ours.load_state_dict(state)
    theirs = comfy.sd.VAE(sd=state, dtype=torch.float32)
    assert theirs.latent_channels == 16
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(1, 64, 96, 3, generator=generator)
    latent = theirs.encode(image)
    assert latent.std() > 0.01
    assert (ours.encode(image.movedim(-1, 1) * 2 - 1) - latent).abs().max() <= TOLERANCE
    z = torch.randn(1, 16, 8, 12, generator=generator)
    decoded = theirs.first_stage_model.decode(z)  # before the clamp to [0, 1]
    assert decoded.std() > 0.01
    assert (ours.decode(z) - decoded).abs().max() <= TOLERANCE
