"""Working in strips gives the untiled result: no seams, no shift of colour, whatever the strips."""

import random
from collections.abc import Callable

import pytest
import torch

from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.davae import DAVAE
from davae_core.strips import Strips

MakeDavae = Callable[..., DAVAE]
Picture = Callable[..., torch.Tensor]
Peak = Callable[[Callable[[], object]], int]
Spans = list[tuple[int, int]]

NEAR = 1e-5
ROWS = [1, 16, 24, 40, 56, 100, 10_000]
UNEQUAL = AutoencoderConfig((32, 64, 96), 2)  # levels with a learned shortcut, and a factor of 4


class Stopped(Exception):
    pass


def heterogeneous(height: int, width: int, batch: int = 1, channels: int = 32) -> torch.Tensor:
    """A latent whose upper half is dark and quiet, whose lower half is bright and noisy."""
    z = torch.randn(batch, channels, height, width)
    z[:, :, : height // 2] = 0.02 * z[:, :, : height // 2] - 2
    z[:, :, height // 2 :] += 2
    return z


def shuffled(spans: Spans) -> Spans:
    return random.Random(0).sample(spans, len(spans))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 4), (7, 2)])
def test_tiled_decode_is_the_untiled_decode(davae: DAVAE, rows: int, height: int, width: int) -> None:
    z = heterogeneous(height, width)
    assert (davae.decode_tiled(z, rows=rows) - davae.decode(z)).abs().max() <= NEAR


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("height", "width"), [(48, 80), (64, 64), (112, 32)])
def test_tiled_encode_is_the_untiled_encode(davae: DAVAE, picture: Picture, rows: int, height: int, width: int) -> None:
    x = picture(height, width)
    assert (davae.encode_tiled(x, rows=rows) - davae.encode(x)).abs().max() <= NEAR


def test_a_512_px_image_decodes_as_untiled(davae: DAVAE) -> None:
    z = heterogeneous(32, 32)
    error = (davae.decode_tiled(z, rows=72) - davae.decode(z)).abs() / 2  # in [0, 1] units
    assert error.mean() <= 0.5 / 255
    assert error.max() <= NEAR


def test_a_512_px_picture_encodes_as_untiled(davae: DAVAE, picture: Picture) -> None:
    x = picture(512)
    error = (davae.encode_tiled(x, rows=72) - davae.encode(x)).abs()
    assert error.mean() <= 0.5 / 255
    assert error.max() <= NEAR


@pytest.mark.parametrize("rows", [20, 33])
@pytest.mark.parametrize("shared_trunk", [True, False])
@pytest.mark.parametrize(("detail", "scale", "base"), [(48, 2, UNEQUAL), (80, 4, UNEQUAL)])
def test_other_shapes_of_model_are_tiled_alike(
    make_davae: MakeDavae,
    picture: Picture,
    rows: int,
    shared_trunk: bool,
    detail: int,
    scale: int,
    base: AutoencoderConfig,
) -> None:
    model = make_davae(detail, scale, base, shared_trunk)
    x = picture(48, 32)
    z = model.encode(x)
    assert (model.encode_tiled(x, rows=rows) - z).abs().max() <= NEAR
    assert (model.decode_tiled(z, rows=rows) - model.decode(z)).abs().max() <= NEAR


def test_each_image_of_a_batch_keeps_its_own_statistics(davae: DAVAE) -> None:
    z = torch.cat([heterogeneous(3, 4), 5 * heterogeneous(3, 4) - 3])
    x = torch.cat([torch.rand(1, 3, 48, 64), torch.rand(1, 3, 48, 64) * 0.01 - 0.9])
    assert (davae.decode_tiled(z, rows=16) - davae.decode(z)).abs().max() <= NEAR
    assert (davae.encode_tiled(x, rows=16) - davae.encode(x)).abs().max() <= NEAR
    assert (davae.decode_tiled(z, rows=16)[1:] - davae.decode_tiled(z[1:], rows=16)).abs().max() <= NEAR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_full_precision_as_untiled(
    davae: DAVAE, picture: Picture, dtype: torch.dtype
) -> None:
    z, x = heterogeneous(4, 3).to(dtype).float(), picture(64, 48).to(dtype).float()
    image, latent = davae.decode(z), davae.encode(x)
    davae.to(dtype)
    for tiled, untiled, exact in (
        (davae.decode_tiled(z.to(dtype), rows=24), davae.decode(z.to(dtype)), image),
        (davae.encode_tiled(x.to(dtype), rows=24), davae.encode(x.to(dtype)), latent),
    ):
        assert tiled.dtype == dtype
        assert (tiled - exact).abs().mean() <= 1.2 * (untiled - exact).abs().mean()


def test_tiling_serves_strength_and_a_given_base_latent_alike(davae: DAVAE, picture: Picture) -> None:
    z, x = heterogeneous(3, 4), picture(48, 64)
    z_base = torch.randn(1, 16, 3, 4)
    assert (davae.decode_tiled(z, 0.3, rows=16) - davae.decode(z, 0.3)).abs().max() <= NEAR
    tiled = davae.encode_tiled(x, z_base, rows=16)
    assert torch.equal(tiled[:, :16], z_base)
    assert (tiled - davae.encode(x, z_base=z_base)).abs().max() <= NEAR


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_input_is_left_as_it_was_in_any_memory_layout(davae: DAVAE, picture: Picture, layout: str) -> None:
    def lay_out(x: torch.Tensor) -> torch.Tensor:
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        return torch.nn.functional.pad(x, (3, 2))[..., 3:-2] if layout == "cropped" else x

    z, x = heterogeneous(3, 4), picture(48, 64)
    z_given, x_given = lay_out(z.clone()), lay_out(x.clone())
    assert (davae.decode_tiled(z_given, rows=16) - davae.decode(z)).abs().max() <= NEAR
    assert (davae.encode_tiled(x_given, rows=16) - davae.encode(x)).abs().max() <= NEAR
    assert torch.equal(z_given, z) and torch.equal(x_given, x)


def test_memory_is_a_fraction_of_the_untiled(make_davae: MakeDavae, picture: Picture, peak: Peak) -> None:
    model = make_davae(base=AutoencoderConfig((32, 64, 128, 128), 1))  # the SD3 VAE's proportions
    z, x = torch.randn(1, 32, 48, 3), picture(768, 48)
    assert peak(lambda: model.decode_tiled(z, rows=32)) <= peak(lambda: model.decode(z)) / 2.5
    assert peak(lambda: model.encode_tiled(x, rows=32)) <= peak(lambda: model.encode(x)) / 2


def test_a_residual_block_at_full_size_holds_one_activation(make_davae: MakeDavae, peak: Peak) -> None:
    model = make_davae(base=AutoencoderConfig((32,), 1))
    h = torch.randn(1, 32, 1024, 8)
    assert peak(lambda: Strips(32).decode(model.decoder, h)) <= 0.6 * h.nbytes  # beside h itself


@pytest.mark.parametrize("order", [lambda spans: spans[::-1], shuffled, lambda spans: spans[1::2] + spans[::2]])
def test_the_order_of_the_strips_does_not_matter(order: Callable[[Spans], Spans]) -> None:
    model = Autoencoder(UNEQUAL).eval()
    h, x = heterogeneous(12, 8, 2, UNEQUAL.feature_channels), torch.rand(2, 3, 48, 32)
    for given, other in (
        (Strips(16).decode(model.decoder, h.clone()), Strips(16, order=order).decode(model.decoder, h.clone())),
        (Strips(16).encode(model.encoder, x), Strips(16, order=order).encode(model.encoder, x)),
    ):  # the statistics of the strips are added up in another order, and nothing else
        assert (other - given).abs().mean() <= 1e-6
        assert (other - given).abs().max() <= NEAR


def test_strips_equal_the_levels_they_replace() -> None:
    model = Autoencoder(UNEQUAL).eval()
    h, x = heterogeneous(5, 3, 1, UNEQUAL.feature_channels), torch.rand(1, 3, 20, 28)
    assert (Strips(9).encode(model.encoder, x) - model.encoder.levels(x)).abs().max() <= NEAR
    expected = model.decoder.levels(h)
    assert (Strips(9).decode(model.decoder, h) - expected).abs().max() <= NEAR


def test_strips_cover_each_level_once_and_are_as_high_as_asked(davae: DAVAE) -> None:
    asked: list[Spans] = []

    def note(spans: Spans) -> Spans:
        asked.append(spans)
        return spans

    Strips(40, order=note).decode(davae.decoder, torch.randn(1, 32, 14, 2))
    for spans in asked:
        assert [row for start, stop in spans for row in range(start, stop)] == list(range(spans[-1][1]))
    heights = {spans[-1][1]: max(stop - start for start, stop in spans) for spans in asked}
    assert heights == {14: 5, 28: 10, 56: 20, 112: 40}


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_each_strip_is_reported(davae: DAVAE, picture: Picture, direction: str) -> None:
    def reports(rows: int) -> int:
        count = 0

        def report() -> None:
            nonlocal count
            count += 1

        if direction == "decode":
            davae.decode_tiled(torch.randn(1, 32, 4, 2), rows=rows, on_strip=report)
        else:
            davae.encode_tiled(picture(64, 32), rows=rows, on_strip=report)
        return count

    assert 0 < reports(64) < reports(16)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_what_on_strip_raises_ends_the_work(davae: DAVAE, picture: Picture, direction: str) -> None:
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise Stopped

    with pytest.raises(Stopped):
        if direction == "decode":
            davae.decode_tiled(torch.randn(1, 32, 4, 2), rows=16, on_strip=stop)
        else:
            davae.encode_tiled(picture(64, 32), rows=16, on_strip=stop)
    assert count == 3
