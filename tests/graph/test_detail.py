"""Detail Encode and Decode through the graph: the base is ComfyUI's own SD3 VAE, sizes, strips, latent conversions."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from davae_core.davae import DAVAE, DAVAEConfig

TRUE_DAVAE, TRUE_VAE = "true_shape_davae.safetensors", "true_shape_sd3_vae.safetensors"


@pytest.fixture(scope="module")
def true_shape(base):
    """Random weights in the true shape of the SD3 VAE (128-256-512-512, 16 channels): a DA-VAE, and its base as a file
    that ComfyUI's own VAE loader reads."""
    torch.manual_seed(0)
    model = DAVAE(DAVAEConfig(base_decoder=True)).eval()
    checkpoints.save_autoencoder(base / "models" / "vae" / TRUE_DAVAE, model)
    plain = {f"encoder.{key}": value for key, value in model.base_encoder.state_dict().items()}
    plain |= {f"decoder.{key}": value for key, value in model.base_decoder.state_dict().items()}
    save_file(plain, base / "models" / "vae" / TRUE_VAE)


@pytest.mark.slow
def test_base_channels_are_comfyuis_sd3_vae_on_the_bicubic_half_size_image(run, true_shape, picture):
    def build(g):
        image = g.node("HarnessConstant", key="image")
        davae = g.node("DAVAE_Loader", davae_name=TRUE_DAVAE, dtype="fp32")
        half = g.node("ImageScale", image=image, upscale_method="bicubic", width=96, height=64, crop="disabled")
        stock = g.node("VAELoader", vae_name=TRUE_VAE)
        encoded = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")
        return {
            "ours": encoded,
            "half": half,
            "stock": g.node("VAEEncode", pixels=g.node("HarnessConstant", key="half"), vae=stock),
            "our decode": g.node("VAEDecode", samples=encoded[1], vae=davae[1]),
            "stock decode": g.node("VAEDecode", samples=encoded[1], vae=stock),
        }

    half = torch.nn.functional.interpolate(picture.movedim(-1, 1), size=(64, 96), mode="bicubic").clamp(0, 1)
    out = run(build, inputs={"image": picture, "half": half.movedim(1, -1)})
    assert torch.allclose(out["half"].clamp(0, 1), half.movedim(1, -1), atol=1e-5)  # the stock bicubic is the same
    assert (out["ours"]["samples"][:, :16] - out["stock"]["samples"]).abs().max() <= 1e-4
    assert (out["our decode"] - out["stock decode"]).abs().max() <= 1e-4
    assert out["stock"]["samples"].std() > 0.01


@pytest.mark.parametrize(("width", "height"), [(192, 128), (100, 70), (33, 31), (1, 1)])
def test_padded_sizes_come_back_as_they_were(run, toys, width, height):
    def build(g):
        davae = toys.davae(g)
        latent = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
        )
        return {
            "latent": latent,
            "image": g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0),
            "resampled": g.node(
                "DAVAE_DetailDecode",
                samples=g.node("LatentUpscaleBy", samples=latent, upscale_method="bilinear", scale_by=2.0),
                davae=davae[2],
                detail_strength=1.0,
            ),
        }

    out = run(build, inputs={"image": torch.rand(1, height, width, 3)})
    rows, columns = (-(-side // 32) * 2 for side in (height, width))
    assert out["latent"]["samples"].shape == (1, 32, rows, columns)
    assert out["image"].shape == (1, height, width, 3)
    assert out["resampled"].shape == (1, 2 * height, 2 * width, 3)  # the padding was scaled up too


def test_nothing_is_cut_off_a_latent_that_was_cropped_or_stretched(run, toys):
    """Where the padding is then cannot be told."""

    def build(g):
        davae = toys.davae(g)
        image = g.node("HarnessConstant", key="image")
        latent = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")
        changed = {
            "cropped": g.node("LatentCrop", samples=latent, width=64, height=64, x=0, y=0),
            "stretched": g.node(
                "LatentUpscale", samples=latent, upscale_method="bilinear", width=256, height=128, crop="disabled"
            ),
        }
        return {
            name: g.node("DAVAE_DetailDecode", samples=samples, davae=davae[2], detail_strength=1.0)
            for name, samples in changed.items()
        }

    out = run(build, inputs={"image": torch.rand(1, 200, 230, 3)})
    assert out["cropped"].shape == (1, 128, 128, 3)
    assert out["stretched"].shape == (1, 256, 512, 3)


def test_crop_rule_cuts_equally_from_both_sides(run, toys):
    image = torch.rand(1, 70, 100, 3)

    def build(g):
        davae = toys.davae(g)
        return {
            "cropped": g.node(
                "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="crop"
            ),
            "by hand": g.node(
                "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="cut"), davae=davae[2], size_rule="pad"
            ),
        }

    out = run(build, inputs={"image": image, "cut": image[:, 3:67, 2:98]})
    assert torch.equal(out["cropped"]["samples"], out["by hand"]["samples"])


def test_a_mask_is_padded_with_its_image_and_survives_a_flip(run, toys):
    """100 x 70 becomes 128 x 96: 14 columns and 13 rows on each side, which are kept and cut off again."""
    mask = torch.zeros(1, 70, 100)
    mask[:, :35] = 1

    def build(g):
        davae = toys.davae(g)
        latent = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad",
            mask=g.node("HarnessConstant", key="mask"),
        )  # fmt: skip
        flipped = g.node("LatentFlip", samples=latent, flip_method="y-axis: horizontally")
        return {
            "latent": latent,
            "sampled": toys.sampler(g, toys.adapter(g, toys.model(g)), latent=latent),
            "flipped": g.node("DAVAE_DetailDecode", samples=flipped, davae=davae[2], detail_strength=1.0),
            "padded": g.node("VAEDecode", samples=flipped, vae=davae[0]),
        }

    out = run(build, inputs={"image": torch.rand(1, 70, 100, 3), "mask": mask})
    noise_mask = out["latent"]["noise_mask"]
    assert noise_mask.shape == (1, 1, 96, 128)
    assert torch.equal(noise_mask[:, 0, 13:83, 14:114], mask)
    assert noise_mask.sum() == mask.sum()
    kept = slice(4, None)  # rows of the latent below the mask
    assert torch.allclose(out["sampled"]["samples"][:, :, kept], out["latent"]["samples"][:, :, kept], atol=1e-4)
    assert not torch.allclose(out["sampled"]["samples"][:, :, :3], out["latent"]["samples"][:, :, :3], atol=1e-2)
    assert torch.equal(out["flipped"], out["padded"][:, 13:83, 14:114])


def test_an_alpha_channel_is_left_out(run, toys, picture):
    def build(g):
        davae = toys.davae(g)
        return {
            name: g.node(
                "DAVAE_DetailEncode", image=g.node("HarnessConstant", key=name), davae=davae[2], size_rule="pad"
            )
            for name in ("rgb", "rgba")
        }

    out = run(build, inputs={"rgb": picture, "rgba": torch.cat([picture, picture[..., :1]], dim=-1)})
    assert torch.equal(out["rgb"]["samples"], out["rgba"]["samples"])


def test_with_little_memory_encode_and_decode_work_in_strips_and_give_the_same(run, toys, picture, monkeypatch):
    import comfy.model_management

    def build(g):
        davae = toys.davae(g)
        latent = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
        )
        image = g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=0.5)
        return {"handle": davae[2], "latent": latent, "image": image}

    images = torch.cat([picture, picture.flip(1)])
    plenty = run(build, inputs={"image": images})
    model = plenty["handle"].model
    calls = []
    for name in ("encode_tiled", "decode_tiled"):
        original = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda *a, _original=original, _name=name, **k: (calls.append(_name), _original(*a, **k))[1]
        )
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 1.0)
    little = run(build, inputs={"image": images})
    assert calls == ["encode_tiled"] * 2 + ["decode_tiled"] * 2
    assert (plenty["latent"]["samples"] - little["latent"]["samples"]).abs().max() <= 1e-4
    assert (plenty["image"] - little["image"]).abs().max() <= 1e-4


def test_a_given_base_latent_becomes_the_base_channels(run, toys, picture):
    base = torch.randn(1, 16, 8, 12)

    def build(g):
        davae, image = toys.davae(g), g.node("HarnessConstant", key="image")
        common = {"image": image, "davae": davae[2], "size_rule": "pad"}
        given = g.node("HarnessConstant", key="base")
        return {
            "plain": g.node("DAVAE_DetailEncode", **common),
            "given": g.node("DAVAE_DetailEncode", **common, base_latent=given),
        }

    out = run(build, inputs={"image": picture, "base": {"samples": base}})
    assert torch.equal(out["given"]["samples"][:, :16], base)
    assert torch.equal(out["given"]["samples"][:, 16:], out["plain"]["samples"][:, 16:])


def test_a_base_latent_gets_zero_detail_and_comes_back_unchanged(run, toys):
    base = torch.randn(2, 16, 6, 10)

    def build(g):
        full = g.node("DAVAE_FromBaseLatent", samples=g.node("HarnessConstant", key="base"))
        return {"full": full, "back": g.node("DAVAE_ToBaseLatent", samples=full)}

    out = run(build, inputs={"base": {"samples": base, "batch_index": [0, 1]}})
    assert out["full"]["samples"].shape == (2, 32, 6, 10)
    assert torch.equal(out["full"]["samples"][:, :16], base)
    assert not out["full"]["samples"][:, 16:].any()
    assert torch.equal(out["back"]["samples"], base)
    assert out["back"]["batch_index"] == [0, 1]


def test_detail_strength_zero_shows_the_base_alone(run, toys):
    z = torch.randn(1, 32, 4, 4)
    other = torch.cat([z[:, :16], torch.randn(1, 16, 4, 4)], dim=1)

    def build(g):
        davae = toys.davae(g)
        return {
            f"{key}{strength}": g.node(
                "DAVAE_DetailDecode",
                samples=g.node("HarnessConstant", key=key),
                davae=davae[2],
                detail_strength=strength,
            )
            for key in "ab"
            for strength in (0.0, 1.0)
        }

    out = run(build, inputs={"a": {"samples": z}, "b": {"samples": other}})
    assert torch.equal(out["a0.0"], out["b0.0"])
    assert not torch.allclose(out["a1.0"], out["b1.0"], atol=1e-3)


@pytest.mark.parametrize(("asked", "made"), [((1024, 1024), (64, 64)), ((33, 64), (4, 4)), ((1000, 500), (64, 32))])
def test_empty_latents_are_rounded_up_to_multiples_of_32(run, toys, asked, made):
    width, height = asked
    out = run(lambda g: {"latent": toys.empty(g, width, height, 2)})
    assert out["latent"]["samples"].shape == (2, 32, made[1], made[0])
    assert not out["latent"]["samples"].any()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_round_trip_is_near_full_precision(run, toys, picture, dtype):
    def build(g):
        latents = {}
        for name in ("fp32", dtype):
            davae = toys.davae(g, name)
            latent = g.node(
                "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
            )
            latents[name] = g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0)
        return latents

    out = run(build, inputs={"image": picture})
    assert (out[dtype] - out["fp32"]).abs().mean() < 0.02
    assert out[dtype].dtype == torch.float32
