"""The memory of a LATENT's padding, and what stock nodes do to the latent that it lies beside."""

from __future__ import annotations

import pytest
import torch


def picture_of(height: int, width: int, seed: int = 3) -> torch.Tensor:
    """A smooth random IMAGE ``[1, height, width, 3]``."""
    small = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)
    return large.movedim(1, -1).contiguous()


@pytest.fixture
def changed(run, toys):
    """``changed(image, build)``: what Detail Decode and stock VAE Decode make of ``build(graph, latent)``."""

    def go(image, build, **inputs):
        def graph(g):
            davae = toys.davae(g)
            encode = {"davae": davae[2], "size_rule": "pad"}
            latent = g.node("DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), **encode)
            latent = build(g, latent, lambda key: g.node("HarnessConstant", key=key), encode)
            return {
                "cut": g.node("DAVAE_DetailDecode", samples=latent, davae=davae[2], detail_strength=1.0),
                "all": g.node("VAEDecode", samples=latent, vae=davae[0]),
            }

        out = run(graph, inputs={"image": image, **inputs})
        return out["cut"], out["all"]

    return go


# 100 x 71 becomes 128 x 96: 14 columns on each side; 12 rows above, 13 below. 120 x 71 becomes a square.
@pytest.mark.parametrize(("height", "width"), [(71, 100), (101, 120)])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", ["", "y-axis: horizontally"])
def test_a_latent_that_is_rotated_or_mirrored_loses_its_padding_where_it_is_now(
    changed, height, width, quarters, mirrored
):
    def build(g, latent, *_):
        if mirrored:
            latent = g.node("LatentFlip", samples=latent, flip_method=mirrored)
        rotation = ["none", "90 degrees", "180 degrees", "270 degrees"][quarters]
        return g.node("LatentRotate", samples=latent, rotation=rotation)

    cut, everything = changed(picture_of(height, width), build)
    rows, columns = (-(-side // 32) * 32 for side in (height, width))
    inside = torch.zeros(1, rows, columns, dtype=torch.bool)
    top, left = (rows - height) // 2, (columns - width) // 2
    inside[:, top : top + height, left : left + width] = True
    if mirrored:
        inside = inside.flip(2)
    inside = torch.rot90(inside, k=quarters, dims=[2, 1])  # as LatentRotate does
    turned = (width, height) if quarters % 2 else (height, width)
    assert torch.equal(cut, everything[inside].view(1, *turned, 3))


@pytest.mark.parametrize("method", ["bilinear", "nearest-exact", "bislerp"])
@pytest.mark.parametrize("scale", [0.5, 1.25, 1.3, 1.5, 1.75, 2.0])
def test_a_latent_that_is_scaled_evenly_loses_its_padding(changed, scale, method):
    """Sides of a latent are rounded when it is scaled."""

    def build(g, latent, *_):
        return g.node("LatentUpscaleBy", samples=latent, upscale_method=method, scale_by=scale)

    cut, everything = changed(picture_of(104, 168), build)  # 128 x 192 with 12 px on each side
    for side in (1, 2):
        of_whole = everything.shape[side] / (128, 192)[side - 1]
        assert cut.shape[side] == round((104, 168)[side - 1] * of_whole)
    down, across = (round(12 * everything.shape[side] / (128, 192)[side - 1]) for side in (1, 2))
    assert torch.equal(cut, everything[:, down : down + cut.shape[1], across : across + cut.shape[2]])


@pytest.mark.parametrize(
    "change",
    ["concat x", "concat both", "batch of unlike sizes", "batch of another padding", "crop", "crop in proportion"],
)
def test_nothing_is_cut_where_the_padding_no_longer_fits_and_the_log_says_so(changed, caplog, change):
    def build(g, latent, given, encode):
        if change == "concat x":
            return g.node("LatentConcat", samples1=latent, samples2=latent, dim="x")
        if change == "concat both":  # of the same proportions as before
            other = g.node("DAVAE_DetailEncode", image=given("other"), **encode)
            row = g.node("LatentConcat", samples1=latent, samples2=other, dim="x")
            below = g.node("LatentConcat", samples1=other, samples2=other, dim="x")
            return g.node("LatentConcat", samples1=row, samples2=below, dim="y")
        if change.startswith("batch"):
            other = g.node("DAVAE_DetailEncode", image=given("other" if "padding" in change else "large"), **encode)
            return g.node("LatentBatch", samples1=latent, samples2=other)
        if change == "crop":
            return g.node("LatentCrop", samples=latent, width=64, height=64, x=0, y=0)
        return g.node("LatentCrop", samples=latent, width=96, height=72, x=32, y=24)

    cut, everything = changed(
        picture_of(180, 250), build, other=picture_of(192, 256, seed=4), large=picture_of(256, 192, seed=5)
    )
    assert torch.equal(cut, everything)
    assert "nothing is cut off" in caplog.text


@pytest.mark.parametrize("change", ["batch", "batch, taken out", "crop", "crop, scaled"])
def test_pictures_that_look_alike_are_not_taken_for_each_other(changed, change):
    """Objects in the middle of a white ground, and parts of a smooth picture, are alike."""

    def round_thing(side, colour):
        y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, side)], indexing="ij")
        inside = ((x**2 + y**2) < 0.5).float()[..., None]
        return (1 - inside + inside * torch.tensor(colour))[None]

    def build(g, latent, given, encode):
        if change.startswith("batch"):
            other = g.node("DAVAE_DetailEncode", image=given("other"), **encode)
            both = g.node("LatentBatch", samples1=latent, samples2=other)
            return g.node("LatentFromBatch", samples=both, batch_index=1, length=1) if "taken" in change else both
        part = g.node("LatentCrop", samples=latent, width=96, height=96, x=8, y=8)
        if change == "crop":
            return part
        return g.node("LatentUpscaleBy", samples=part, upscale_method="bilinear", scale_by=4 / 3)

    smooth = torch.linspace(0, 1, 250)[None, :, None, None].expand(1, 250, 250, 3)
    first = round_thing(110, (0.9, 0.5, 0.2)) if change.startswith("batch") else smooth.contiguous()
    cut, everything = changed(first, build, other=round_thing(128, (0.8, 0.6, 0.2)))
    assert torch.equal(cut, everything)


def test_variants_at_a_larger_size_are_cut_whatever_is_drawn(run, toys):
    """Image to image and hires fix: repeated, sampled with another prompt, scaled, sampled again, one taken out."""

    def build(g):
        davae = toys.davae(g)
        latent = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
        )
        model = toys.adapter(g, toys.model(g))
        four = toys.ksampler(g, model, g.node("RepeatLatentBatch", samples=latent, amount=4), denoise=0.5)
        large = g.node("LatentUpscaleBy", samples=four, upscale_method="bislerp", scale_by=1.5)
        again = toys.ksampler(g, model, large, denoise=0.9)
        turned = g.node("LatentRotate", samples=again, rotation="90 degrees")
        one = g.node("LatentFromBatch", samples=turned, batch_index=2, length=1)
        decode = {"davae": davae[2], "detail_strength": 1.0}
        return {
            name: g.node("DAVAE_DetailDecode", samples=samples, **decode)
            for name, samples in (("four", four), ("again", again), ("one", one))
        }

    out = run(build, inputs={"image": picture_of(100, 110)})
    assert out["four"].shape == (4, 100, 110, 3)
    assert out["again"].shape == (4, 150, 165, 3) and out["one"].shape == (1, 165, 150, 3)


def test_a_picture_that_is_taken_out_of_others_is_known_again(changed):
    def build(g, latent, given, encode):
        other = g.node("DAVAE_DetailEncode", image=given("other"), **encode)
        both = g.node("LatentBatch", samples1=latent, samples2=other)
        return g.node("LatentFromBatch", samples=both, batch_index=0, length=1)

    assert changed(picture_of(100, 120), build, other=picture_of(128, 128, seed=4))[0].shape == (1, 100, 120, 3)


def test_pictures_of_a_batch_are_cut_when_they_are_repeated_or_taken_apart(changed):
    def repeated(g, latent, *_):
        return g.node("RepeatLatentBatch", samples=latent, amount=3)

    def taken(g, latent, *_):
        return g.node("LatentFromBatch", samples=latent, batch_index=1, length=1)

    pictures = torch.cat([picture_of(100, 120, seed) for seed in (1, 2, 3)])
    assert changed(pictures, repeated)[0].shape == (9, 100, 120, 3)
    assert changed(pictures, taken)[0].shape == (1, 100, 120, 3)


def test_sampled_anew_a_picture_keeps_its_padding_in_mind(run, toys):
    def build(g):
        davae = toys.davae(g)
        latent = g.node(
            "DAVAE_DetailEncode", image=g.node("HarnessConstant", key="image"), davae=davae[2], size_rule="pad"
        )
        sampled = toys.ksampler(g, toys.adapter(g, toys.model(g)), latent, denoise=1.0)
        return {"image": g.node("DAVAE_DetailDecode", samples=sampled, davae=davae[2], detail_strength=1.0)}

    assert run(build, inputs={"image": picture_of(100, 120)})["image"].shape == (1, 100, 120, 3)


def test_a_picture_that_needs_no_padding_has_nothing_to_remember(run, toys):
    def build(g):
        davae, image = toys.davae(g), g.node("HarnessConstant", key="image")
        return {"latent": g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad")}

    assert "davae_padding" not in run(build, inputs={"image": picture_of(96, 128)})["latent"]
    assert "davae_padding" in run(build, inputs={"image": picture_of(96, 127)})["latent"]
