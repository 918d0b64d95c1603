"""DA-VAE: a base latent that is the base VAE's own, a detail latent beside it, one decoder for both."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.errors import CheckpointError, DAVAEError, LatentError
from davae_core.latent import LatentSpec, with_base, with_zero_detail
from davae_core.latent_blocks import DownBlock, UpBlock

MakeDavae = Callable[..., DAVAE]
Picture = Callable[..., torch.Tensor]


def only_shortcut(block: DownBlock | UpBlock) -> DownBlock | UpBlock:
    block.conv.weight.zero_()
    block.conv.bias.zero_()
    return block


# Shapes


@pytest.mark.parametrize(
    ("scale", "detail", "down_learned", "up_learned"),
    [
        (2, 16, False, False),
        (2, 32, False, True),
        (2, 48, True, False),
        (2, 80, True, True),
        (4, 16, False, False),
        (4, 48, True, False),
        (4, 64, False, True),
        (4, 80, True, True),
    ],
)
@pytest.mark.parametrize("shared_trunk", [True, False])
def test_image_to_latent_to_image(
    make_davae: MakeDavae, scale: int, detail: int, down_learned: bool, up_learned: bool, shared_trunk: bool
) -> None:
    model = make_davae(detail, scale, shared_trunk=shared_trunk)
    assert (model.detail_down.shortcut is not None, model.joint_up.shortcut is not None) == (down_learned, up_learned)
    factor = 8 * scale
    x = torch.rand(2, 3, 2 * factor, 3 * factor) * 2 - 1
    z = model.encode(x)
    assert z.shape == (2, 16 + detail, 2, 3)
    assert model.detail_moments(x).shape == (2, 2 * detail, 2, 3)
    assert model.decode(z).shape == x.shape


@pytest.mark.parametrize(("detail", "scale"), [(16, 2), (80, 2), (48, 4)])
def test_a_small_model_is_known_by_its_shapes(make_davae: MakeDavae, detail: int, scale: int) -> None:
    model = make_davae(detail, scale, base_decoder=True)
    assert DAVAEConfig.from_state_dict(model.state_dict()) == model.config


@pytest.mark.parametrize(("detail", "scale", "strided"), [(12, 2, False), (4, 4, True)])
def test_other_base_vaes_fit_too(make_davae: MakeDavae, detail: int, scale: int, strided: bool) -> None:
    base = AutoencoderConfig((32, 64, 96), 1, latent_channels=4)
    model = make_davae(detail, scale, base, base_shift=0.0, base_scale=1.0)
    assert model.detail_down.strided == strided
    x = torch.rand(1, 3, 8 * scale, 12 * scale)
    z = model.encode(x)
    assert z.shape == (1, 4 + detail, 2, 3)
    assert model.decode(z).shape == x.shape
    assert DAVAEConfig.from_state_dict(model.state_dict()) == model.config


# The base latent


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("shared_trunk", [True, False])
def test_first_channels_are_the_base_vae_on_the_bicubic_small_image(
    make_davae: MakeDavae, picture: Picture, scale: int, shared_trunk: bool
) -> None:
    model = make_davae(scale=scale, shared_trunk=shared_trunk)
    base = Autoencoder(model.config.base).eval()
    base.encoder.load_state_dict(model.base_encoder.state_dict())
    x = picture(64, 128, batch=2)
    small = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", align_corners=False).clamp(-1, 1)
    assert torch.equal(model.encode(x)[:, :16], base.encode(small))
    assert torch.equal(model.encode_base(x), base.encode(small))


def test_small_image_is_clamped_where_bicubic_overshoots(davae: DAVAE) -> None:
    x = torch.full((1, 3, 32, 32), -1.0)
    x[..., 16:] = 1.0
    assert F.interpolate(x, scale_factor=0.5, mode="bicubic").abs().max() > 1
    assert davae.shrink(x).abs().max() == 1


def test_a_given_base_latent_is_used_unchanged(davae: DAVAE) -> None:
    x, z_base = torch.rand(2, 3, 32, 48), torch.randn(2, 16, 2, 3)
    z = davae.encode(x, z_base=z_base)
    assert torch.equal(z[:, :16], z_base)
    assert torch.equal(z[:, 16:], davae.encode(x)[:, 16:])


def test_generator_draws_the_detail_and_leaves_the_base_at_its_mean(davae: DAVAE) -> None:
    x = torch.rand(2, 3, 32, 32)
    mean, logvar = davae.detail_moments(x).chunk(2, dim=1)
    z = davae.encode(x)
    sample = davae.encode(x, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(z[:, 16:], mean)
    assert torch.equal(sample[:, :16], z[:, :16])
    assert torch.allclose(sample[:, 16:], mean + noise * torch.exp(logvar / 2), atol=1e-6)


def test_detail_sees_what_the_small_image_has_lost(davae: DAVAE) -> None:
    x = torch.rand(1, 3, 32, 32) * 0.2
    shrinking = F.interpolate(torch.eye(32)[None, None], size=(16, 32), mode="bicubic", align_corners=False)[0, 0]
    lost = torch.linalg.svd(shrinking).Vh[-1]  # a pattern of 32 rows that shrinks to nothing
    stripes = lost.view(32, 1)
    assert torch.allclose(davae.shrink(x + stripes), davae.shrink(x), atol=1e-6)
    assert torch.allclose(davae.encode_base(x + stripes), davae.encode_base(x), atol=1e-5)
    assert (davae.encode_detail(x + stripes) - davae.encode_detail(x)).abs().max() > 1e-2


def test_shared_trunk_is_the_base_encoders_and_a_separate_one_is_its_own(make_davae: MakeDavae) -> None:
    x = torch.rand(1, 3, 32, 32)
    shared, separate = make_davae(), make_davae(shared_trunk=False)
    before = shared.encode_detail(x), separate.encode_detail(x)
    for model in (shared, separate):
        model.base_encoder.conv_in.weight.mul_(2)
    assert not torch.allclose(shared.encode_detail(x), before[0])
    assert torch.equal(separate.encode_detail(x), before[1])


# Shortcuts of the two blocks


@pytest.mark.parametrize(("channels", "out", "scale"), [(8, 4, 2), (8, 32, 2), (4, 4, 4), (6, 3, 2)])
def test_down_shortcut_averages_groups_of_unshuffled_channels(channels: int, out: int, scale: int) -> None:
    block = only_shortcut(DownBlock(channels, out, scale))
    x = torch.randn(2, channels, 2 * scale, 3 * scale)
    group = channels * scale**2 // out
    expected = torch.zeros(2, out, 2, 3)
    for o in range(out):
        for u in range(o * group, (o + 1) * group):  # unshuffled channel: (channel, row, column in the s x s cell)
            c, dy, dx = u // scale**2, u // scale % scale, u % scale
            for i in range(2):
                for j in range(3):
                    expected[:, o, i, j] += x[:, c, i * scale + dy, j * scale + dx] / group
    assert torch.allclose(block(x), expected, atol=1e-6)


@pytest.mark.parametrize(("channels", "out", "scale"), [(4, 4, 2), (8, 4, 2), (16, 32, 4), (3, 6, 2)])
def test_up_shortcut_repeats_channels(channels: int, out: int, scale: int) -> None:
    block = only_shortcut(UpBlock(channels, out, scale))
    z = torch.randn(2, channels, 2, 3)
    repeats = out * scale**2 // channels
    expected = torch.zeros(2, out, 2 * scale, 3 * scale)
    for o in range(out):
        for y in range(2 * scale):
            for x in range(3 * scale):
                shuffled = o * scale**2 + y % scale * scale + x % scale
                expected[:, o, y, x] = z[:, shuffled // repeats, y // scale, x // scale]
    assert torch.equal(block(z), expected)


def test_a_shortcut_that_does_not_divide_starts_as_a_zero_convolution() -> None:
    for block, x in (
        (DownBlock(8, 12, 2), torch.randn(1, 8, 4, 4)),
        (UpBlock(12, 8, 2), torch.randn(1, 12, 2, 2)),
    ):
        assert block.shortcut.kernel_size == (1, 1)
        assert block.shortcut.bias is None
        assert only_shortcut(block)(x).abs().max() == 0


@pytest.mark.parametrize(
    ("block", "shuffle"),
    [
        (DownBlock(8, 8, 2), lambda h: F.pixel_unshuffle(h, 2)),
        (DownBlock(8, 6, 2), lambda h: h),  # 6 is no multiple of 4: a convolution of stride 2
        (DownBlock(8, 12, 2), lambda h: h),  # means and log-variances would share one of three channels
        (UpBlock(8, 8, 2), lambda h: F.pixel_shuffle(h, 2)),
    ],
)
def test_convolution_is_added_to_the_shortcut(
    block: DownBlock | UpBlock, shuffle: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.randn(1, 8, 4, 4)
    convolved = shuffle(block.conv(x))
    assert torch.allclose(block(x) - convolved, only_shortcut(block)(x), atol=1e-6)


# Decoding


def test_at_strength_zero_the_detail_channels_do_not_matter(davae: DAVAE) -> None:
    z = torch.randn(1, 32, 2, 3)
    other = torch.cat([z[:, :16], 100 * torch.randn(1, 16, 2, 3)], dim=1)
    assert torch.equal(davae.decode(z, 0.0), davae.decode(other, 0.0))
    assert not torch.allclose(davae.decode(z), davae.decode(other))


def test_full_strength_is_the_default_and_strength_scales_the_detail(davae: DAVAE) -> None:
    z = torch.randn(1, 32, 2, 3)
    halved = torch.cat([z[:, :16], z[:, 16:] / 2], dim=1)
    assert torch.equal(davae.decode(z), davae.decode(z, 1.0))
    assert torch.equal(davae.decode(z, 0.5), davae.decode(halved))
    assert not torch.allclose(davae.decode(z, 0.5), davae.decode(z))


def test_decoder_sees_the_base_channels_as_the_diffusion_model_does(make_davae: MakeDavae) -> None:
    model = make_davae()
    plain = make_davae(base_shift=0.0, base_scale=1.0)
    plain.load_state_dict(model.state_dict())
    z = torch.randn(1, 32, 2, 2)
    told = torch.cat([(z[:, :16] - 0.0609) * 1.5305, z[:, 16:]], dim=1)
    assert torch.allclose(model.decode(z), plain.decode(told), atol=1e-6)


def test_base_decoder_is_the_base_vaes(make_davae: MakeDavae) -> None:
    model = make_davae(base_decoder=True)
    base = Autoencoder(model.config.base).eval()
    base.decoder.load_state_dict(model.base_decoder.state_dict())
    z_base = torch.randn(2, 16, 3, 2)
    assert torch.equal(model.decode_base(z_base), base.decode(z_base))


def test_without_a_base_decoder_the_error_says_where_to_find_one(davae: DAVAE) -> None:
    with pytest.raises(DAVAEError, match=r"holds no base decoder.*base model's own VAE"):
        davae.decode_base(torch.randn(1, 16, 2, 2))


# Wrong input


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 40, 32), (1, 3, 32, 24), (1, 3, 0, 16)])
@pytest.mark.parametrize("method", ["encode", "encode_base", "encode_detail", "encode_tiled", "shrink"])
def test_a_wrong_image_is_refused_with_its_shape_and_the_right_one(
    davae: DAVAE, shape: tuple[int, ...], method: str
) -> None:
    with pytest.raises(LatentError) as error:
        getattr(davae, method)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert "[batch, 3, height, width]" in str(error.value)
    assert "multiples of 16" in str(error.value)


@pytest.mark.parametrize("shape", [(1, 16, 2, 2), (1, 48, 2, 2), (32, 2, 2), (1, 32, 1, 2, 2)])
@pytest.mark.parametrize("method", ["decode", "decode_tiled"])
def test_a_wrong_latent_is_refused_with_its_shape_and_the_right_one(
    davae: DAVAE, shape: tuple[int, ...], method: str
) -> None:
    with pytest.raises(LatentError) as error:
        getattr(davae, method)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert "[batch, 32, height/16, width/16] (16 base + 16 detail channels)" in str(error.value)


@pytest.mark.parametrize("shape", [(1, 16, 4, 6), (1, 32, 2, 3), (2, 16, 2, 3), (16, 2, 3)])
@pytest.mark.parametrize("method", ["encode", "encode_tiled"])
def test_a_wrong_base_latent_is_refused_with_its_shape_and_the_right_one(
    davae: DAVAE, shape: tuple[int, ...], method: str
) -> None:
    with pytest.raises(LatentError) as error:
        getattr(davae, method)(torch.zeros(1, 3, 32, 48), z_base=torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert "[1, 16, 2, 3]" in str(error.value)
    assert "1/2 of the size" in str(error.value)


@pytest.mark.parametrize(
    ("base", "latent"),
    [
        (AutoencoderConfig((32, 32, 32, 32), 1, 8), LatentSpec()),
        (AutoencoderConfig((32, 32), 1), LatentSpec()),
    ],
)
def test_a_latent_of_another_vae_is_refused(base: AutoencoderConfig, latent: LatentSpec) -> None:
    with pytest.raises(DAVAEError, match="does not fit the base VAE"):
        DAVAEConfig(base, latent)


@pytest.mark.parametrize("missing", ["joint_up.conv.weight", "base_encoder.conv_in.weight"])
def test_a_state_dict_without_a_telling_tensor_is_refused_by_its_name(davae: DAVAE, missing: str) -> None:
    state = davae.state_dict()
    del state[missing]
    with pytest.raises(CheckpointError, match=missing):
        DAVAEConfig.from_state_dict(state)


# The latent's units


def test_base_channels_are_normalised_as_sd3_does() -> None:
    z = torch.randn(2, 32, 3, 3)
    assert torch.allclose(LatentSpec().normalise(z)[:, :16], (z[:, :16] - 0.0609) * 1.5305, atol=1e-6)


def test_detail_channels_are_normalised_by_their_own_statistics() -> None:
    spec = LatentSpec(detail_mean=tuple(range(16)), detail_std=tuple(0.5 + i for i in range(16)))
    z = torch.randn(2, 32, 3, 3)
    for i in range(16):
        assert torch.allclose(spec.normalise(z)[:, 16 + i], (z[:, 16 + i] - i) / (0.5 + i), atol=1e-5)


def test_denormalise_undoes_normalise() -> None:
    spec = LatentSpec(detail_mean=(0.3,) * 16, detail_std=tuple(0.1 * (i + 1) for i in range(16)))
    z = torch.randn(2, 32, 3, 3)
    assert torch.allclose(spec.denormalise(spec.normalise(z)), z, atol=1e-5)
    assert torch.allclose(spec.normalise(spec.denormalise(z)), z, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16, 2, 2), (1, 1, 2, 2), (32, 2, 2)])
@pytest.mark.parametrize("method", ["normalise", "denormalise"])
def test_units_of_a_wrong_latent_are_refused(shape: tuple[int, ...], method: str) -> None:
    with pytest.raises(LatentError, match=r"expected \[batch, 32"):
        getattr(LatentSpec(), method)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_units_keep_the_dtype(dtype: torch.dtype) -> None:
    z = torch.randn(1, 32, 2, 2).to(dtype)
    expected = (z[:, :16].double() - 0.0609) * 1.5305
    told = LatentSpec().normalise(z)
    assert told.dtype == LatentSpec().denormalise(z).dtype == dtype
    assert torch.allclose(
        told[:, :16].double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps
    )


def test_statistics_are_stored_in_the_configuration_and_change_nothing_else(davae: DAVAE) -> None:
    x, before = torch.rand(1, 3, 32, 32), davae.config
    z = davae.encode(x)
    mean, std = tuple(0.1 * i for i in range(16)), tuple(1.0 + i for i in range(16))
    davae.set_detail_statistics(mean, std)
    assert (davae.latent.detail_mean, davae.latent.detail_std) == (mean, std)
    assert davae.config.base == before.base
    assert davae.latent.base_shift == before.latent.base_shift
    assert torch.equal(davae.encode(x), z)
    assert torch.allclose(davae.latent.normalise(z)[:, 19], (z[:, 19] - mean[3]) / std[3])


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.0,) * 15, (1.0,) * 16, "detail_mean must hold 16 numbers, got 15"),
        ((0.0,) * 16, (1.0,) * 17, "detail_std must hold 16 numbers, got 17"),
        ((0.0,) * 16, (1.0,) * 15 + (0.0,), "above 0"),
        ((0.0,) * 16, (1.0,) * 15 + (-1.0,), "above 0"),
        ((0.0,) * 16, (1.0,) * 15 + (float("nan"),), "finite"),
        ((float("inf"),) + (0.0,) * 15, (1.0,) * 16, "finite"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(
    davae: DAVAE, mean: tuple[float, ...], std: tuple[float, ...], message: str
) -> None:
    with pytest.raises(DAVAEError, match=message):
        davae.set_detail_statistics(mean, std)
    assert davae.latent == LatentSpec()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"detail_channels": 24}, "24 detail on 16 base"),
        ({"detail_channels": 0}, "0 detail on 16 base"),
        ({"base_channels": 0}, "16 detail on 0 base"),
        ({"scale": 3}, "must be 2 or 4, got 3"),
        ({"base_scale": 0.0}, "above 0"),
        ({"base_shift": float("nan")}, "finite"),
    ],
)
def test_a_latent_that_cannot_be_is_refused(bad: dict[str, float], message: str) -> None:
    with pytest.raises(DAVAEError, match=message):
        LatentSpec(**bad)


def test_split_gives_base_then_detail_as_views() -> None:
    spec = LatentSpec(detail_channels=48)
    z = torch.randn(1, 64, 2, 2)
    base, detail = spec.split(z)
    assert torch.equal(torch.cat([base, detail], dim=1), z)
    assert base.shape[1] == 16 and detail.shape[1] == 48
    assert base.data_ptr() == z.data_ptr()


def test_an_ordinary_latent_becomes_one_with_zero_detail(davae: DAVAE) -> None:
    z_base = torch.randn(2, 16, 2, 3).bfloat16()
    z = with_zero_detail(z_base, davae.latent)
    assert z.dtype == torch.bfloat16
    assert torch.equal(z[:, :16], z_base)
    assert z[:, 16:].abs().max() == 0
    noisy = torch.cat([z[:, :16], torch.randn(2, 16, 2, 3)], dim=1).float()
    assert torch.equal(davae.decode(z.float()), davae.decode(noisy, 0.0))


@pytest.mark.parametrize("batch", [1, 3])
def test_another_base_goes_under_the_same_detail(batch: int) -> None:
    spec = LatentSpec(detail_channels=48, scale=4)
    z, z_base = torch.randn(3, 64, 2, 5), torch.randn(batch, 16, 2, 5)
    swapped = with_base(z, z_base, spec)
    assert torch.equal(swapped[:, :16], z_base.expand(3, -1, -1, -1))
    assert torch.equal(swapped[:, 16:], z[:, 16:])


@pytest.mark.parametrize("shape", [(2, 16, 2, 5), (3, 32, 2, 5), (3, 16, 2, 4), (3, 16, 2)])
def test_a_base_of_another_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(LatentError, match=r"\[3, 16, 2, 5\], or a batch of 1: .* at 1/2 size") as error:
        with_base(torch.zeros(3, 32, 2, 5), torch.zeros(shape), LatentSpec())
    assert str(list(shape)) in str(error.value) and "[3, 32, 2, 5]" in str(error.value)


@pytest.mark.parametrize("shape", [(1, 32, 2, 2), (16, 2, 2)])
def test_zero_detail_is_added_to_base_latents_only(shape: tuple[int, ...]) -> None:
    with pytest.raises(LatentError, match=r"expected \[batch, 16, height, width\]") as error:
        with_zero_detail(torch.zeros(shape), LatentSpec())
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_compiles_in_one_graph(davae: DAVAE, picture: Callable[..., torch.Tensor], direction: str) -> None:
    given = picture(32, 48) if direction == "encode" else torch.randn(1, 32, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(davae, direction), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(given), getattr(davae, direction)(given), atol=1e-6)
