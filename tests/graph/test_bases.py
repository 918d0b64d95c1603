"""DA-VAEs on all three layouts of base VAE through the graph, and ComfyUI's own VAE on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from davae_core import bases, checkpoints
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.latent import LatentSpec
from davae_core.training.tasks.begin import on_base
from harness.layouts import DETAIL, LAYOUTS, random_vae

CASES = [(layout, scale) for layout in LAYOUTS for scale in (2, 4)]
UNITS = {"sd3": (0.0609, 1.5305), "sd1": (0.0, 0.18215), "vavae": ((0.1,) * 32, (0.5,) * 32)}


@pytest.fixture(scope="module")
def davae_file(base):
    """``davae_file(layout, scale)``: the name of a DA-VAE in models/vae, on the VAE of random_vae."""

    def write(layout: str, scale: int) -> str:
        model = on_base(random_vae(layout), DETAIL[layout], scale, layout == "vavae", UNITS[layout])
        model.set_detail_statistics([0.1] * DETAIL[layout], [2.0] * DETAIL[layout])
        name = f"on_{layout}_{scale}.safetensors"
        checkpoints.save_autoencoder(base / "models" / "vae" / name, model)
        return name

    return write


@pytest.mark.parametrize(("layout", "scale"), CASES)
def test_round_trip_through_the_graph(run, davae_file, layout, scale):
    config, detail = LAYOUTS[layout], DETAIL[layout]
    channels, factor, name = config.latent_channels, config.factor * scale, davae_file(layout, scale)
    step = 2 * factor  # sides are brought to multiples of it

    def build(g):
        davae = g.node("DAVAE_Loader", davae_name=name, dtype="fp32")
        image = g.node("HarnessConstant", key="image")
        encoded = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")
        exact = g.node("HarnessConstant", key="exact")
        return {
            "handle": davae[2],
            "base vae": davae[1],
            "latent": encoded[0],
            "base": encoded[1],
            "image": g.node("DAVAE_DetailDecode", samples=encoded, davae=davae[2], detail_strength=1.0),
            "base image": g.node("VAEDecode", samples=encoded[1], vae=davae[1]),
            "exact": g.node("DAVAE_DetailEncode", image=exact, davae=davae[2], size_rule="pad"),
            "stock": g.node("VAEEncode", pixels=exact, vae=davae[0]),
            "stock tiled": g.node(
                "VAEEncodeTiled", pixels=exact, vae=davae[0], tile_size=64, overlap=0, temporal_size=64,
                temporal_overlap=8,
            ),
            "stock image": g.node("VAEDecode", samples=encoded, vae=davae[0]),
            "from base": g.node("DAVAE_FromBaseLatent", samples=encoded[1], davae=davae[2]),
            "to base": g.node("DAVAE_ToBaseLatent", samples=encoded, davae=davae[2]),
            "swapped": g.node("DAVAE_SwapBase", samples=encoded, base_latent=encoded[1], davae=davae[2]),
            "empty": g.node("DAVAE_EmptyLatent", width=step, height=step + 32, batch_size=1, davae=davae[2]),
        }  # fmt: skip

    torch.manual_seed(1)
    image, exact = torch.rand(1, step - 5, step // 2, 3), torch.rand(1, step, step, 3)
    out = run(build, inputs={"image": image, "exact": exact})
    latent, base = out["latent"]["samples"], out["base"]["samples"]
    assert latent.shape == (1, channels + detail, 2, 2)
    assert torch.equal(base, latent[:, :channels])
    assert out["image"].shape == image.shape
    assert out["stock image"].shape == (1, step, step, 3)
    top, left = 2, step // 4  # the padding, half on either side
    assert torch.equal(out["image"], out["stock image"][:, top : top + step - 5, left : left + step // 2])
    assert out["base image"].shape == (1, step // scale, step // scale, 3)
    assert out["image"].std() > 0.01 and out["base image"].std() > 0.01

    model = out["handle"].model
    assert torch.equal(out["exact"]["samples"], model.encode(exact.movedim(-1, 1) * 2 - 1))
    assert (out["stock"]["samples"] - out["exact"]["samples"]).abs().max() <= 1e-5
    assert (out["stock tiled"]["samples"] - out["exact"]["samples"]).abs().max() <= 1e-4
    vae = random_vae(layout)
    assert out["base vae"].get_sd().keys() == vae.state_dict().keys()
    with torch.no_grad():
        assert (vae.decode(base).movedim(1, -1) / 2 + 0.5).clamp(0, 1).sub(out["base image"]).abs().max() <= 1e-5

    assert torch.equal(out["to base"]["samples"], base)
    assert torch.equal(out["swapped"]["samples"], latent)
    assert torch.equal(out["from base"]["samples"][:, :channels], base)
    assert not out["from base"]["samples"][:, channels:].any()
    assert out["empty"]["samples"].shape == (1, channels + detail, 4, 2)
    assert out["empty"]["downscale_ratio_spacial"] == factor


def comfyui_vae(layout: str, state: dict[str, torch.Tensor]):
    """ComfyUI's own VAE on these weights. Its loader knows no VA-VAE and only full widths, so the shape is given."""
    import comfy.sd

    config = LAYOUTS[layout]
    shape = {
        "double_z": True, "z_channels": config.latent_channels, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [width // 32 for width in config.widths], "num_res_blocks": config.blocks,
        "attn_resolutions": [256 >> level for level in config.attention], "dropout": 0.0,
    }  # fmt: skip
    told = {"params": {"ddconfig": shape, "embed_dim": config.latent_channels}}
    return comfy.sd.VAE(sd=state, config=told, dtype=torch.float32)


@pytest.mark.parametrize("layout", ["sd1", "vavae"])
def test_the_base_latent_is_that_of_comfyuis_own_vae(comfy, run, davae_file, layout):
    name, factor = davae_file(layout, 2), LAYOUTS[layout].factor
    stock = comfyui_vae(layout, random_vae(layout).state_dict())

    def build(g):
        davae = g.node("DAVAE_Loader", davae_name=name, dtype="fp32")
        encoded = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
        )
        vae = g.node("HarnessConstant", key="stock")
        return {
            "ours": encoded[1],
            "stock": g.node("VAEEncode", pixels=g.node("HarnessConstant", key="half"), vae=vae),
            "our image": g.node("VAEDecode", samples=encoded[1], vae=davae[1]),
            "stock image": g.node("VAEDecode", samples=encoded[1], vae=vae),
        }

    image = torch.rand(1, 4 * factor, 8 * factor, 3)
    size = (2 * factor, 4 * factor)
    half = torch.nn.functional.interpolate(image.movedim(-1, 1) * 2 - 1, size=size, mode="bicubic").clamp(-1, 1)
    out = run(build, inputs={"image": image, "half": half.movedim(1, -1) / 2 + 0.5, "stock": stock})
    assert out["stock"]["samples"].std() > 0.01
    assert (out["ours"]["samples"] - out["stock"]["samples"]).abs().max() <= 1e-4
    assert out["stock image"].std() > 0.01
    assert (out["our image"] - out["stock image"]).abs().max() <= 1e-4


def test_comfyuis_loader_reads_the_sd1_layout_as_we_do(base, run):
    """At full width, where its VAE Loader recognises the file."""
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig(latent_channels=4, quant_conv=True)).eval()
    save_file(vae.state_dict(), base / "models" / "vae" / "true_shape_sd1_vae.safetensors")

    def build(g):
        stock = g.node("VAELoader", vae_name="true_shape_sd1_vae.safetensors")
        encoded = g.node("VAEEncode", pixels=g.node("HarnessConstant", key="image"), vae=stock)
        return {"latent": encoded, "image": g.node("VAEDecode", samples=encoded, vae=stock)}

    image = torch.rand(1, 32, 48, 3)
    out = run(build, inputs={"image": image})
    z = out["latent"]["samples"]
    with torch.no_grad():
        assert (vae.encode(image.movedim(-1, 1) * 2 - 1) - z).abs().max() <= 1e-4
        decoded = (vae.decode(z).movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    assert z.std() > 0.01 and decoded.std() > 0.01
    assert (decoded - out["image"]).abs().max() <= 1e-4


# The diffusion side: units and previews


@pytest.mark.parametrize("base_model", [b for b in bases.BASES.values() if b.comfyui_latents], ids=lambda b: b.name)
def test_units_are_those_of_comfyui(comfy, base_model):
    from comfy import latent_formats

    theirs = getattr(latent_formats, base_model.comfyui_latents)()
    z = torch.randn(1, base_model.latent_channels, 2, 2)
    assert theirs.latent_channels == base_model.latent_channels
    shift, scale = base_model.normalisation
    spec = LatentSpec(base_model.latent_channels, base_model.latent_channels, base_shift=shift, base_scale=scale)
    assert torch.allclose(spec.normalise_base(z), theirs.process_in(z), atol=1e-6)


@pytest.mark.parametrize("base_model", [bases.SD1, bases.SDXL, bases.SD3, bases.FLUX1], ids=lambda b: b.name)
def test_previews_show_the_base_in_its_own_models_colours(comfy, base_model):
    import latent_preview
    from comfy import latent_formats

    shift, scale = base_model.normalisation
    channels = base_model.latent_channels
    spec = LatentSpec(channels, 2 * channels, base_shift=shift, base_scale=scale)
    theirs = getattr(latent_formats, base_model.comfyui_latents)()
    ours = comfy.pack("nodes.comfy_bridge.latent_format").latent_format(spec)()
    assert ours.latent_rgb_factors[:channels] == theirs.latent_rgb_factors
    z = torch.randn(1, 3 * channels, 4, 4)

    def picture(format, latent):
        factors, bias = format.latent_rgb_factors, format.latent_rgb_factors_bias
        return latent_preview.Latent2RGBPreviewer(factors, bias).decode_latent_to_preview(latent)

    assert list(picture(ours, z).getdata()) == list(picture(theirs, z[:, :channels]).getdata())


def test_without_known_colours_there_is_no_preview(comfy):
    import latent_preview

    spec = LatentSpec(32, 96, base_factor=16, base_shift=0.0, base_scale=1.0)
    seam = comfy.pack("nodes.comfy_bridge.latent_format")
    format = seam.latent_format(spec)()
    assert format.latent_rgb_factors is None and format.taesd_decoder_name is None
    assert latent_preview.get_previewer(torch.device("cpu"), format) is None
    coloured = seam.latent_format(replace(spec, preview=(0.1,) * 99))()  # the file brings its own
    assert coloured.latent_rgb_factors == [[0.1] * 3] * 32 + [[0.0] * 3] * 96
