"""A DA-VAE on FLUX.1's VAE, at full width in the layout of its ``ae.safetensors``, beside ComfyUI's own classes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.davae import DAVAE
from davae_core.latent import with_zero_detail
from davae_core.predictor import DetailPredictor, PredictorConfig
from davae_core.training import pretrained
from davae_core.training.recipes.flux_vae import FLUX_VAE_F16
from davae_core.training.tasks.begin import on_base

VAE, DAVAE_FILE = "ae.safetensors", "flux_davae.safetensors"
TOLERANCE = 1e-4


@dataclass
class Files:
    """What is in models/vae, and the models that were written there."""

    vae: Autoencoder
    davae: DAVAE


@pytest.fixture(scope="module")
def files(base) -> Files:
    """A VAE with random weights, bare as FLUX.1's is published, and a DA-VAE made on it as training makes one."""
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig()).eval()
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.GroupNorm):
                torch.nn.init.normal_(module.weight, 1.0, 0.2)
                torch.nn.init.normal_(module.bias, 0.0, 0.2)
    path = base / "models" / "vae" / VAE
    save_file(vae.state_dict(), path)
    family = pretrained.base_of_file(path, vae.config, FLUX_VAE_F16.family)
    davae = on_base(
        pretrained.base_vae(path), FLUX_VAE_F16.detail_channels, FLUX_VAE_F16.scale, False, family.normalisation
    )
    davae.set_detail_statistics([0.1] * 16, [2.0] * 16)
    checkpoints.save_autoencoder(base / "models" / "vae" / DAVAE_FILE, davae.eval())
    return Files(vae, davae)


@pytest.fixture(scope="module")
def pictures() -> dict[str, torch.Tensor]:
    """A smooth IMAGE ``[1, 96, 64, 3]``, and the half-size one that its base is the latent of."""
    small = torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(3))
    x = torch.nn.functional.interpolate(small, size=(96, 64), mode="bicubic").clamp(0, 1) * 2 - 1
    half = torch.nn.functional.interpolate(x, size=(48, 32), mode="bicubic").clamp(-1, 1)
    return {name: value.movedim(1, -1) / 2 + 0.5 for name, value in (("image", x), ("half", half))}


def test_the_file_is_laid_out_as_comfyui_lays_out_its_flux_vae(comfy, files):
    import comfy.sd

    theirs = comfy.sd.VAE(sd=dict(files.vae.state_dict()), dtype=torch.float32)
    assert theirs.latent_channels == 16
    shapes = {name: tensor.shape for name, tensor in theirs.first_stage_model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in files.vae.state_dict().items()}


def test_base_and_pictures_are_those_of_comfyuis_own_vae(comfy, run, files, pictures):
    """The base VAE output, in the stock nodes, beside the stock loader on the bare file."""

    def build(g):
        stock = g.node("VAELoader", vae_name=VAE)
        davae = g.node("DAVAE_Loader", davae_name=DAVAE_FILE, dtype="fp32")
        image, half = (g.node("HarnessConstant", key=key) for key in ("image", "half"))
        encoded = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")
        return {
            "handle": davae[2],
            "detail encode": encoded[1],
            "base vae": g.node("VAEEncode", pixels=half, vae=davae[1]),
            "stock": g.node("VAEEncode", pixels=half, vae=stock),
            "base vae image": g.node("VAEDecode", samples=encoded[1], vae=davae[1]),
            "stock image": g.node("VAEDecode", samples=encoded[1], vae=stock),
        }

    out = run(build, inputs=pictures)
    stock = out["stock"]["samples"]
    assert stock.shape == (1, 16, 6, 4) and stock.std() > 0.01
    for name in ("detail encode", "base vae"):
        assert (out[name]["samples"] - stock).abs().max() <= TOLERANCE, name
    assert out["stock image"].std() > 0.01
    assert (out["base vae image"] - out["stock image"]).abs().max() <= TOLERANCE
    from comfy import latent_formats

    assert torch.allclose(
        out["handle"].latent.normalise_base(stock), latent_formats.Flux().process_in(stock), atol=1e-6
    )
    assert not torch.allclose(
        out["handle"].latent.normalise_base(stock), latent_formats.SD3().process_in(stock), atol=0.1
    )


def test_strips_give_what_the_whole_picture_gives(run, files, pictures):
    """The stock tiled nodes on the VAE output work in strips; so does the core, at any height of a strip."""

    def build(g):
        davae = g.node("DAVAE_Loader", davae_name=DAVAE_FILE, dtype="fp32")
        image = g.node("HarnessConstant", key="image")
        tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
        encoded = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")
        return {
            "latent": encoded[0],
            "tiled latent": g.node("VAEEncodeTiled", pixels=image, vae=davae[0], **tiles),
            "image": g.node("DAVAE_DetailDecode", samples=encoded[0], davae=davae[2], detail_strength=1.0),
            "tiled image": g.node("VAEDecodeTiled", samples=encoded[0], vae=davae[0], **tiles),
        }

    out = run(build, inputs=pictures)
    z, x = out["latent"]["samples"], pictures["image"].movedim(-1, 1) * 2 - 1
    assert z.shape == (1, 32, 6, 4) and out["image"].shape == pictures["image"].shape and out["image"].std() > 0.01
    assert (out["tiled latent"]["samples"] - z).abs().max() <= TOLERANCE
    assert (out["tiled image"] - out["image"]).abs().max() <= TOLERANCE
    with torch.no_grad():
        assert (files.davae.encode_tiled(x, rows=32) - z).abs().max() <= TOLERANCE
        in_strips = (files.davae.decode_tiled(z, rows=32).movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    assert (in_strips - out["image"]).abs().max() <= TOLERANCE


@pytest.fixture
def flux(comfy):
    """A FLUX.1 as small as ComfyUI's class can be, as MODEL; random weights."""
    import comfy.model_management
    from comfy import model_patcher, supported_models
    from comfy.ldm.flux.model import FluxParams

    shape = {
        "image_model": "flux", "axes_dim": [8, 12, 12], "num_heads": 2, "mlp_ratio": 2.0, "theta": 10000,
        "out_channels": 16, "qkv_bias": True, "in_channels": 16, "hidden_size": 64, "context_in_dim": 64,
        "patch_size": 2, "vec_in_dim": 32, "depth": 1, "depth_single_blocks": 1, "guidance_embed": True,
        "txt_ids_dims": [],
    }  # fmt: skip
    known = {"image_model", *(field.name for field in fields(FluxParams))}
    shape = {name: value for name, value in shape.items() if name in known}  # 0.3.75 knows no txt_ids_dims
    config = supported_models.Flux(shape)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(1)
    model = config.get_model({}, "", device="cpu")
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            parameter.normal_(0, 0.05)
    device = comfy.model_management.get_torch_device()
    return model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=torch.device("cpu"))


def sampled(g, width=64, height=96):
    """What a stock FLUX workflow samples: an empty latent, guidance in the conditioning, cfg 1."""
    text = g.node("HarnessConditioning", context=64, pooled=32, seed=1)
    guided = g.node("FluxGuidance", conditioning=text, guidance=3.5)
    return g.node(
        "KSampler", model=g.node("HarnessConstant", key="flux"), seed=5, steps=2, cfg=1.0, sampler_name="euler",
        scheduler="simple", denoise=1.0, positive=guided, negative=text,
        latent_image=g.node("EmptySD3LatentImage", width=width, height=height, batch_size=1),
    )  # fmt: skip


def test_the_latent_of_a_stock_flux_workflow_is_decoded_at_twice_its_size(comfy, run, files, flux):
    """KSampler gives latents in the VAE's units, which are what the Detail nodes and the predictor take."""
    from comfy import latent_formats

    def build(g):
        davae, latent = g.node("DAVAE_Loader", davae_name=DAVAE_FILE, dtype="fp32"), sampled(g)
        based = g.node("DAVAE_FromBaseLatent", samples=latent, davae=davae[2])
        return {
            "latent": latent,
            "based": based,
            "twice": g.node("DAVAE_DetailDecode", samples=based, davae=davae[2], detail_strength=1.0),
            "once": g.node("VAEDecode", samples=latent, vae=g.node("VAELoader", vae_name=VAE)),
            "once by ours": g.node("VAEDecode", samples=latent, vae=davae[1]),
        }

    out = run(build, inputs={"flux": flux})
    z = out["latent"]["samples"]
    assert z.shape == (1, 16, 12, 8)
    assert out["once"].shape == (1, 96, 64, 3) and out["twice"].shape == (1, 192, 128, 3)
    assert (out["once by ours"] - out["once"]).abs().max() <= TOLERANCE
    assert torch.equal(out["based"]["samples"][:, :16], z) and not out["based"]["samples"][:, 16:].any()
    with torch.no_grad():
        expected = files.davae.decode(with_zero_detail(z, files.davae.latent))
    assert out["twice"].std() > 0.01
    assert ((expected.movedim(1, -1) / 2 + 0.5).clamp(0, 1) - out["twice"]).abs().max() <= TOLERANCE

    # What the sampler worked on is what the predictor reads: the latent in FLUX.1's own units.
    torch.manual_seed(2)
    predictor = DetailPredictor(PredictorConfig(files.davae.latent, width=64, blocks=1)).eval()
    torch.nn.init.normal_(predictor.conv_out.weight, 0, 0.1)
    whole = predictor.complete(z)
    with torch.no_grad():
        detail = predictor(latent_formats.Flux().process_in(z)) * 2.0 + 0.1  # statistics of the file
    assert detail.std() > 0.1 and torch.equal(whole[:, :16], z)
    assert (whole[:, 16:] - detail).abs().max() <= TOLERANCE

    def decode(g):
        davae = g.node("DAVAE_Loader", davae_name=DAVAE_FILE, dtype="fp32")
        latent = g.node("HarnessConstant", key="whole")
        return {"image": g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0)}

    image = run(decode, inputs={"whole": {"samples": whole}})["image"]
    assert image.shape == out["twice"].shape and (image - out["twice"]).abs().max() > 0.01


def test_a_latent_of_another_shape_is_refused_by_name(fails, files):
    """FLUX.2 has 128 channels; Qwen-Image and Wan have 16, with a dimension for time."""
    for shape in ((1, 128, 6, 4), (1, 16, 1, 12, 8)):

        def build(g):
            davae = g.node("DAVAE_Loader", davae_name=DAVAE_FILE, dtype="fp32")
            return g.node("DAVAE_FromBaseLatent", samples=g.node("HarnessConstant", key="z"), davae=davae[2])

        said = fails(build, inputs={"z": {"samples": torch.zeros(shape)}})
        assert str(list(shape)) in said and "expected [batch, 16, height, width]" in said


@pytest.mark.parametrize("name", ["Flux", "FluxSchnell", "Lumina2", "ZImage", "HiDream", "Chroma", "Omnigen2"])
def test_the_models_that_share_flux_s_vae_share_its_units(comfy, name):
    from comfy import latent_formats, supported_models

    format = getattr(supported_models, name).latent_format()
    z = torch.randn(1, 16, 2, 2)
    assert format.latent_channels == 16
    assert torch.equal(format.process_in(z), latent_formats.Flux().process_in(z))
