"""Re-roll Detail and Swap Base through the graph: the base is kept, the detail follows seed, mask and denoise."""

from __future__ import annotations

import pytest
import torch

# Detail that a mask keeps: rounding by the latent's scale and by the sampler's steps. The base is kept bit for bit.
KEPT = 1e-5


@pytest.fixture
def finished() -> dict[str, torch.Tensor]:
    """A LATENT as a sampler would leave it."""
    return {"samples": torch.randn(2, 32, 8, 12, generator=torch.Generator().manual_seed(4))}


def reroll(g, toys, model=None, **inputs):
    """The node on the LATENT given as ``finished``: MODEL, LATENT."""
    model = model or toys.adapter(g, toys.model(g))
    return g.node("DAVAE_RerollDetail", model=model, samples=g.node("HarnessConstant", key="finished"), **inputs)


def stock(g, toys, rolled, **settings):
    return toys.ksampler(g, rolled[0], rolled[1], **settings)


def ours(g, toys, rolled, **settings):
    return toys.sampler(g, rolled[0], latent=rolled[1], **settings)


def changed(a: dict, b: dict) -> tuple[float, float]:
    """Largest change of the base and mean change of the detail."""
    difference = (a["samples"] - b["samples"]).abs()
    return difference[:, :16].max().item(), difference[:, 16:].mean().item()


@pytest.mark.parametrize("sampler", [stock, ours])
@pytest.mark.parametrize("denoise", [1.0, 0.4])
def test_the_base_is_kept_and_each_seed_gives_other_detail(run, toys, finished, sampler, denoise):
    def build(g):
        rolled = reroll(g, toys)
        return {f"{seed}": sampler(g, toys, rolled, seed=seed, denoise=denoise, steps=4) for seed in (1, 2)}

    out = run(build, inputs={"finished": finished})
    for seed in ("1", "2"):
        base, detail = changed(out[seed], finished)
        assert base == 0
        assert detail > 0.1
    assert changed(out["1"], out["2"])[1] > 0.1


def test_both_samplers_make_the_same_detail_from_the_same_settings(run, toys, finished):
    def build(g):
        rolled = reroll(g, toys, g.node("ModelSamplingSD3", model=toys.adapter(g, toys.model(g)), shift=5.0))
        return {"stock": stock(g, toys, rolled), "ours": ours(g, toys, rolled)}

    out = run(build, inputs={"finished": finished})
    assert torch.equal(out["stock"]["samples"], out["ours"]["samples"])


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("dpmpp_2m", "sgm_uniform"),
        ("euler_ancestral", "normal"),
        ("dpmpp_sde", "beta"),
        ("dpm_fast", "simple"),
        ("uni_pc", "simple"),  # writes into its sigmas
        ("uni_pc_bh2", "normal"),
    ],
)
def test_other_samplers_and_schedulers_keep_the_base_too(run, toys, finished, sampler, scheduler):
    """dpm_fast ends before the last of the noise is gone."""
    settings = {"sampler_name": sampler, "scheduler": scheduler, "steps": 4}
    out = run(lambda g: {"x": stock(g, toys, reroll(g, toys), **settings)}, inputs={"finished": finished})
    base, detail = changed(out["x"], finished)
    assert base == 0 and detail > 0.1


def test_low_denoise_stays_nearer_to_the_old_detail(run, toys, finished):
    def build(g):
        rolled = reroll(g, toys)
        return {name: stock(g, toys, rolled, denoise=value) for name, value in {"low": 0.1, "high": 1.0}.items()}

    out = run(build, inputs={"finished": finished})
    assert 0 < changed(out["low"], finished)[1] < 0.5 * changed(out["high"], finished)[1]


def test_the_base_is_kept_at_every_step_and_not_only_put_back_at_the_end(run, toys, finished):
    """The detail of a run that samples the base along is other detail."""

    def build(g):
        rolled = reroll(g, toys)
        return {"kept": stock(g, toys, rolled), "free": toys.ksampler(g, toys.adapter(g, toys.model(g)), rolled[1])}

    out = run(build, inputs={"finished": finished})
    assert changed(out["kept"], out["free"])[1] > 0.01


def test_without_the_node_the_sampler_changes_the_base(run, toys, finished):
    def build(g):
        latent = g.node("HarnessConstant", key="finished")
        return {"x": toys.ksampler(g, toys.adapter(g, toys.model(g)), latent)}

    assert changed(run(build, inputs={"finished": finished})["x"], finished)[0] > 0.1


@pytest.mark.parametrize("sampler", [stock, ours])
def test_a_mask_in_image_pixels_confines_the_change(run, toys, finished, sampler):
    mask = torch.zeros(1, 128, 192)
    mask[:, :, :96] = 1  # the left half: latent columns 0 to 5

    def build(g):
        return {"x": sampler(g, toys, reroll(g, toys, mask=g.node("HarnessConstant", key="mask")))}

    x = run(build, inputs={"finished": finished, "mask": mask})["x"]["samples"]
    difference = (x - finished["samples"]).abs()
    assert difference[:, :, :, 6:].max() <= KEPT
    assert difference[:, :16].max() == 0
    assert difference[:, 16:, :, :6].mean() > 0.1


def test_the_noise_mask_of_the_latent_counts_unless_a_mask_is_given(run, toys, finished):
    left, right = torch.zeros(1, 128, 192), torch.zeros(1, 128, 192)
    left[:, :, :96], right[:, :, 96:] = 1, 1

    def build(g):
        given = g.node("HarnessConstant", key="right")
        return {
            "own": stock(g, toys, reroll(g, toys)),
            "given": stock(g, toys, reroll(g, toys, mask=given)),
        }

    inputs = {"finished": {**finished, "noise_mask": left[:, None]}, "right": right}
    out = {key: (value["samples"] - finished["samples"]).abs() for key, value in run(build, inputs=inputs).items()}
    assert out["own"][..., 6:].max() <= KEPT < 0.1 < out["own"][:, 16:, :, :6].mean()
    assert out["given"][..., :6].max() <= KEPT < 0.1 < out["given"][:, 16:, :, 6:].mean()


def test_the_mask_is_padded_as_the_image_was(run, toys):
    """100 x 70 becomes 128 x 96: 14 columns and 13 rows on each side, also after scaling up by two."""

    def build(g):
        davae = toys.davae(g)
        model = toys.adapter(g, toys.model(g))
        latent = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
        )
        twice = g.node("LatentUpscaleBy", samples=latent, upscale_method="bilinear", scale_by=2.0)
        return {
            name: g.node("DAVAE_RerollDetail", model=model, samples=z, mask=g.node("HarnessConstant", key=name))[1]
            for name, z in {"once": latent, "twice": twice}.items()
        }

    masks = {"once": torch.ones(1, 70, 100), "twice": torch.ones(1, 140, 200)}
    out = run(build, inputs={"image": torch.rand(1, 70, 100, 3), **masks})
    once, twice = out["once"]["noise_mask"], out["twice"]["noise_mask"]
    assert once.shape == (1, 1, 96, 128) and once.sum() == 70 * 100 and once[:, :, 13:83, 14:114].all()
    assert twice.shape == (1, 1, 192, 256) and twice.sum() == 140 * 200 and twice[:, :, 26:166, 28:228].all()


def test_differential_diffusion_before_or_after_still_decides_when_each_place_is_sampled(run, toys, finished):
    """A mask from black to white: Differential Diffusion samples grey places in the last steps only."""

    def build(g):
        adapted, mask = toys.adapter(g, toys.model(g)), g.node("HarnessConstant", key="ramp")

        def differential(model):
            return g.node("DifferentialDiffusion", model=model, strength=1.0)

        plain = reroll(g, toys, adapted, mask=mask)
        models = {
            "plain": plain[0],
            "before": reroll(g, toys, differential(adapted), mask=mask)[0],
            "after": differential(plain[0]),
            "whole": differential(adapted),
        }
        return {name: toys.ksampler(g, model, plain[1], steps=6) for name, model in models.items()}

    out = run(build, inputs={"finished": finished, "ramp": torch.linspace(0, 1, 192).expand(1, 128, 192)})
    base, detail = changed(out["before"], finished)
    assert base == 0 and detail > 0.1
    assert torch.equal(out["before"]["samples"], out["after"]["samples"])
    assert changed(out["before"], out["plain"])[1] > 0.01
    assert changed(out["whole"], finished)[0] > 0.1  # alone, it samples the base as well
    assert changed(out["before"], out["whole"])[1] > 0.01


def test_images_of_a_batch_are_rerolled_each_with_its_own_noise(run, toys, finished):
    same = {"samples": finished["samples"][:1].repeat(3, 1, 1, 1)}
    out = run(lambda g: {"x": stock(g, toys, reroll(g, toys))}, inputs={"finished": same})["x"]["samples"]
    assert out.shape == (3, 32, 8, 12)
    assert torch.equal(out[:, :16], same["samples"][:, :16])
    assert (out[0, 16:] - out[1, 16:]).abs().mean() > 0.1 and (out[1, 16:] - out[2, 16:]).abs().mean() > 0.1


def test_the_connected_model_and_latent_stay_as_they_are(run, toys, finished):
    model = run(lambda g: {"model": toys.adapter(g, toys.model(g))})["model"]
    before = finished["samples"].clone()

    def sampled(rolled: bool) -> torch.Tensor:
        def build(g):
            source = g.node("HarnessConstant", key="model")
            latent = g.node("HarnessConstant", key="finished")
            return {"x": stock(g, toys, reroll(g, toys, source)) if rolled else toys.ksampler(g, source, latent)}

        return run(build, inputs={"model": model, "finished": finished})["x"]["samples"]

    first = sampled(rolled=False)
    assert not torch.equal(sampled(rolled=True), first)
    assert torch.equal(sampled(rolled=False), first)
    assert "denoise_mask_function" not in model.model_options and not model.get_all_wrappers("outer_sample")
    assert torch.equal(finished["samples"], before) and "noise_mask" not in finished


def test_previews_arrive_at_every_step(comfy, toys, finished):
    from harness.graph import Graph

    g = Graph()
    g.node("HarnessCapture", value=stock(g, toys, reroll(g, toys), steps=3, seed=77), key="latent")
    assert len(comfy.run(g.prompt, inputs={"finished": finished}).previews) == 3


def test_what_was_sampled_can_be_rerolled_and_decoded(run, toys):
    def build(g):
        davae, model = toys.davae(g), toys.adapter(g, toys.model(g))
        first = toys.sampler(g, model)
        rolled = g.node("DAVAE_RerollDetail", model=model, samples=first)
        second = toys.sampler(g, rolled[0], latent=rolled[1], seed=6)
        again = g.node("DAVAE_RerollDetail", model=rolled[0], samples=second)
        third = toys.sampler(g, again[0], latent=again[1], seed=7)
        images = {
            f"image {name}": g.node("DAVAE_DetailDecode", samples=z, davae=davae[2], detail_strength=1.0)
            for name, z in (("1", first), ("2", second))
        }
        return {"1": first, "2": second, "3": third, **images}

    out = run(build)
    for name in ("2", "3"):
        base, detail = changed(out[name], out["1"])
        assert base == 0 and detail > 0.1
    assert (out["image 1"] - out["image 2"]).abs().max() > 1e-3


def test_the_model_without_its_latent_is_refused_before_the_first_step(comfy, fails, toys, finished):
    def build(g):
        return toys.ksampler(g, reroll(g, toys)[0], g.node("HarnessConstant", key="finished"))

    message = fails(build, inputs={"finished": finished})
    assert "no noise mask" in message and "LATENT output of Re-roll Detail" in message


def test_rerolling_with_an_unadapted_model(fails, toys, finished):
    message = fails(lambda g: reroll(g, toys, toys.model(g))[1], inputs={"finished": finished})
    assert "not adapted" in message and "DA-VAE Adapter" in message and "choose an adapter file" not in message


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 4, 8, 8), (1, 32, 2, 8, 8)])
def test_rerolling_a_latent_that_is_no_davae_latent(fails, toys, shape):
    message = fails(lambda g: reroll(g, toys)[1], inputs={"finished": {"samples": torch.randn(shape)}})
    assert "the LATENT has" in message and "32" in message and "Empty DA-VAE Latent" in message


def test_swapping_the_base_gives_what_encoding_with_that_base_gives(run, toys, picture):
    def build(g):
        davae, image = toys.davae(g), g.node("HarnessConstant", key="image")
        common = {"image": image, "davae": davae[2], "size_rule": "pad"}
        base, plain = g.node("HarnessConstant", key="base"), g.node("DAVAE_DetailEncode", **common)
        return {
            "swapped": g.node("DAVAE_SwapBase", samples=plain, base_latent=base),
            "told its shape": g.node("DAVAE_SwapBase", samples=plain, base_latent=base, davae=davae[2]),
            "encoded": g.node("DAVAE_DetailEncode", **common, base_latent=base),
            "back": g.node("DAVAE_SwapBase", samples=plain, base_latent=plain[1]),
            "plain": plain,
        }

    images = torch.cat([picture, picture.flip(1)])
    out = run(build, inputs={"image": images, "base": {"samples": torch.randn(2, 16, 8, 12)}})
    out = {key: value["samples"] for key, value in out.items()}
    assert torch.equal(out["swapped"], out["encoded"]) and torch.equal(out["told its shape"], out["encoded"])
    assert not torch.equal(out["swapped"], out["plain"])
    assert torch.equal(out["back"], out["plain"])


def test_a_swap_keeps_what_else_the_latent_carries_and_one_base_serves_a_batch(run, toys, finished):
    carried = {"noise_mask": torch.rand(1, 1, 8, 12), "davae_padding": "as it was", "batch_index": [3, 4]}
    base = torch.randn(1, 16, 8, 12)

    def build(g):
        samples, new = (g.node("HarnessConstant", key=key) for key in ("finished", "base"))
        return {"x": g.node("DAVAE_SwapBase", samples=samples, base_latent=new)}

    out = run(build, inputs={"finished": {**finished, **carried}, "base": {"samples": base}})["x"]
    assert torch.equal(out["samples"][:, :16], base.expand(2, -1, -1, -1))
    assert torch.equal(out["samples"][:, 16:], finished["samples"][:, 16:])
    assert torch.equal(out["noise_mask"], carried["noise_mask"])
    assert out["davae_padding"] == "as it was" and out["batch_index"] == [3, 4]


@pytest.mark.parametrize("shape", [(1, 16, 16, 24), (1, 32, 8, 12), (3, 16, 8, 12), (1, 16, 1, 8, 12)])
def test_a_base_that_does_not_fit_under_the_detail(fails, toys, finished, shape):
    def build(g):
        samples, new = (g.node("HarnessConstant", key=key) for key in ("finished", "base"))
        return g.node("DAVAE_SwapBase", samples=samples, base_latent=new)

    message = fails(build, inputs={"finished": finished, "base": {"samples": torch.zeros(shape)}})
    assert str(list(shape)) in message and "[2, 32, 8, 12]" in message and "[2, 16, 8, 12]" in message


def test_swapping_the_base_of_an_ordinary_latent(fails, toys):
    def build(g):
        plain = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        return g.node("DAVAE_SwapBase", samples=plain, base_latent=plain)

    message = fails(build)
    assert "16 channels" in message and "Base to DA-VAE Latent" in message
