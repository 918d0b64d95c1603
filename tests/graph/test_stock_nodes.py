"""Stock nodes on our VAE, MODEL and LATENT objects."""

from __future__ import annotations

import itertools

import pytest
import torch


def mask_for(picture: torch.Tensor) -> torch.Tensor:
    """The left half is to be painted anew."""
    mask = torch.zeros(picture.shape[:3])
    mask[:, :, : picture.shape[2] // 2] = 1
    return mask


def test_vae_encode_and_decode_give_what_detail_encode_and_decode_give(run, toys, picture):
    def build(g):
        davae, image = toys.davae(g), g.node("HarnessConstant", key="image")
        stock = g.node("VAEEncode", pixels=image, vae=davae[0])
        ours = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")
        return {
            "stock latent": stock,
            "our latent": ours,
            "stock image": g.node("VAEDecode", samples=ours, vae=davae[0]),
            "our image": g.node("DAVAE_DetailDecode", samples=ours, davae=davae[2], detail_strength=1.0),
        }

    out = run(build, inputs={"image": picture})
    assert out["stock latent"]["samples"].shape == (1, 32, 8, 12)
    assert torch.allclose(out["stock latent"]["samples"], out["our latent"]["samples"], atol=1e-5)
    assert out["stock image"].shape == picture.shape
    assert torch.allclose(out["stock image"], out["our image"], atol=1e-5)
    assert out["our image"].min() >= 0 and out["our image"].max() <= 1


def test_tiled_stock_nodes_give_exactly_the_untiled_result(run, toys, picture):
    def build(g):
        davae, image = toys.davae(g), g.node("HarnessConstant", key="image")
        tile = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
        latent = g.node("VAEEncode", pixels=image, vae=davae[0])
        return {
            "latent": latent,
            "tiled latent": g.node("VAEEncodeTiled", pixels=image, vae=davae[0], **tile),
            "image": g.node("VAEDecode", samples=latent, vae=davae[0]),
            "tiled image": g.node("VAEDecodeTiled", samples=latent, vae=davae[0], **tile),
        }

    out = run(build, inputs={"image": torch.cat([picture, picture.flip(1)])})
    assert (out["tiled latent"]["samples"] - out["latent"]["samples"]).abs().max() <= 1e-4
    assert (out["tiled image"] - out["image"]).abs().max() <= 1e-4


def test_inpainting_by_mask_keeps_what_is_not_masked(run, toys, picture):
    def build(g):
        davae, image = toys.davae(g), g.node("HarnessConstant", key="image")
        mask = g.node("HarnessConstant", key="mask")
        model = toys.adapter(g, toys.model(g))
        latent = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")
        masked = g.node("SetLatentNoiseMask", samples=latent, mask=mask)
        inpaint = g.node("VAEEncodeForInpaint", pixels=image, vae=davae[0], mask=mask, grow_mask_by=0)
        return {
            "latent": latent,
            "masked": toys.ksampler(g, model, masked, denoise=1.0),
            "inpaint latent": inpaint,
            "inpaint": toys.ksampler(g, model, inpaint, denoise=1.0),
        }

    out = {
        key: value["samples"] for key, value in run(build, inputs={"image": picture, "mask": mask_for(picture)}).items()
    }
    kept, painted = slice(7, None), slice(0, 5)
    assert torch.allclose(out["masked"][..., kept], out["latent"][..., kept], atol=1e-4)
    assert (out["masked"][..., painted] - out["latent"][..., painted]).abs().max() > 0.1
    assert torch.allclose(out["inpaint"][..., kept], out["inpaint latent"][..., kept], atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "scheduler"), list(itertools.product(["euler", "dpmpp_2m", "uni_pc"], ["simple", "sgm_uniform"]))
)
def test_samplers_and_schedulers(run, toys, sampler, scheduler):
    settings = {"sampler_name": sampler, "scheduler": scheduler, "steps": 4}

    def build(g):
        model = toys.adapter(g, toys.model(g))
        return {"stock": toys.ksampler(g, model, toys.empty(g), **settings), "ours": toys.sampler(g, model, **settings)}

    out = {key: value["samples"] for key, value in run(build).items()}
    assert out["stock"].isfinite().all()
    assert out["ours"].isfinite().all()


def test_ksampler_advanced_continues_where_it_stopped(run, toys):
    def stage(g, model, latent, start, end, noise):
        return g.node(
            "KSamplerAdvanced", model=model, add_noise="enable" if noise else "disable", noise_seed=5, steps=6, cfg=2.0,
            sampler_name="euler", scheduler="simple", **toys.conditioning(g), latent_image=latent, start_at_step=start,
            end_at_step=end, return_with_leftover_noise="enable" if end < 6 else "disable",
        )  # fmt: skip

    def build(g):
        model = toys.adapter(g, toys.model(g))
        half = stage(g, model, toys.empty(g), 0, 3, noise=True)
        return {
            "in two": stage(g, model, half, 3, 6, noise=False),
            "in one": toys.ksampler(g, model, toys.empty(g), steps=6),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    assert torch.allclose(out["in two"], out["in one"], atol=1e-4)


def test_sampler_custom_advanced_makes_the_same_image(run, toys):
    def build(g):
        model = toys.adapter(g, toys.model(g))
        conds = toys.conditioning(g)
        custom = g.node(
            "SamplerCustomAdvanced",
            noise=g.node("RandomNoise", noise_seed=5),
            guider=g.node("CFGGuider", model=model, **conds, cfg=2.0),
            sampler=g.node("KSamplerSelect", sampler_name="euler"),
            sigmas=g.node("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0),
            latent_image=toys.empty(g),
        )
        return {"custom": custom[0], "ksampler": toys.ksampler(g, model, toys.empty(g))}

    out = {key: value["samples"] for key, value in run(build).items()}
    assert torch.allclose(out["custom"], out["ksampler"], atol=1e-5)


def test_batches_are_the_single_images_side_by_side(run, toys):
    def build(g):
        davae = toys.davae(g)
        latent = g.node("HarnessConstant", key="latent")
        return {
            "both": g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0),
            "sampled": toys.ksampler(g, toys.adapter(g, toys.model(g)), toys.empty(g, batch=3)),
        }

    z = torch.randn(2, 32, 4, 6, generator=torch.Generator().manual_seed(0))
    out = run(build, inputs={"latent": {"samples": z}})
    one = run(build, inputs={"latent": {"samples": z[1:]}})
    assert out["both"].shape == (2, 64, 96, 3)
    assert torch.allclose(out["both"][1:], one["both"], atol=1e-5)
    assert out["sampled"]["samples"].shape == (3, 32, 8, 8)
    assert not torch.allclose(out["sampled"]["samples"][0], out["sampled"]["samples"][1])


def test_image_to_image_at_low_denoise_stays_near_the_image(run, toys, picture):
    def build(g):
        davae = toys.davae(g)
        model = toys.adapter(g, toys.model(g))
        latent = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
        )
        return {
            "latent": latent,
            "near": toys.sampler(g, model, latent=latent, denoise=0.1, steps=2),
            "far": toys.sampler(g, model, latent=latent, denoise=0.9, steps=2),
        }

    out = {key: value["samples"] for key, value in run(build, inputs={"image": picture}).items()}
    near, far = ((out[key] - out["latent"]).abs().mean() for key in ("near", "far"))
    assert 0 < near < far


@pytest.mark.parametrize(("width", "height"), [(80, 48), (100, 77)])
def test_sizes_that_vae_encode_leaves_odd_in_the_latent(run, toys, width, height):
    """VAE Encode crops to the autoencoder's factor, 16, and not to 32: the model pads the odd row and column."""

    def build(g):
        davae = toys.davae(g)
        latent = g.node("VAEEncode", pixels=g.node("HarnessConstant", key="image"), vae=davae[0])
        sampled = toys.ksampler(g, toys.adapter(g, toys.model(g)), latent, denoise=0.5)
        return {"image": g.node("DAVAE_DetailDecode", samples=sampled, davae=davae[2], detail_strength=1.0)}

    image = run(build, inputs={"image": torch.rand(1, height, width, 3)})["image"]
    assert image.shape == (1, height // 16 * 16, width // 16 * 16, 3)


@pytest.mark.parametrize(("width", "height"), [(128, 64), (64, 192), (352, 32)])
def test_non_square_sizes(run, toys, width, height):
    def build(g):
        davae = toys.davae(g)
        latent = toys.sampler(g, toys.adapter(g, toys.model(g)), width=width, height=height)
        return {"image": g.node("VAEDecode", samples=latent, vae=davae[0])}

    assert run(build)["image"].shape == (1, height, width, 3)


def test_the_base_vae_is_a_stock_vae_for_half_size_images(run, toys, picture):
    def build(g):
        davae = toys.davae(g)
        encoded = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
        )
        taken = g.node("DAVAE_ToBaseLatent", samples=encoded[0])
        return {
            "base": encoded[1],
            "taken": taken,
            "image": g.node("VAEDecode", samples=taken, vae=davae[1]),
            "again": g.node("VAEEncode", pixels=g.node("VAEDecode", samples=taken, vae=davae[1]), vae=davae[1]),
        }

    out = run(build, inputs={"image": picture})
    assert torch.equal(out["base"]["samples"], out["taken"]["samples"])
    assert out["image"].shape == (1, 64, 96, 3)
    assert out["again"]["samples"].shape == out["base"]["samples"].shape
