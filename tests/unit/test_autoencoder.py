"""The base autoencoder: sizes, one-sided padding, attention, and how moments become a latent."""

import pytest
import torch
import torch.nn.functional as F

from davae_core.autoencoder import (
    AttnBlock,
    Autoencoder,
    AutoencoderConfig,
    Downsample,
    ResnetBlock,
    Upsample,
    latent_from_moments,
)
from davae_core.errors import CheckpointError, DAVAEError


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (AutoencoderConfig((32, 32, 32, 32), 1), 24, 40),
        (AutoencoderConfig((32, 64, 96), 1, latent_channels=4), 20, 12),
        (AutoencoderConfig((64,), 2, latent_channels=8, image_channels=1), 5, 7),
    ],
)
def test_latent_is_the_image_divided_by_the_factor(config: AutoencoderConfig, height: int, width: int) -> None:
    model = Autoencoder(config).eval()
    x = torch.rand(2, config.image_channels, height, width) * 2 - 1
    z = model.encode(x)
    assert z.shape == (2, config.latent_channels, height // config.factor, width // config.factor)
    assert model.decode(z).shape == x.shape


def test_every_group_norm_has_32_groups_and_sd3_epsilon(toy_vae: AutoencoderConfig) -> None:
    norms = [module for module in Autoencoder(toy_vae).modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)}


def test_encode_without_a_generator_is_the_mean(toy_vae: AutoencoderConfig) -> None:
    model = Autoencoder(toy_vae).eval()
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.encode(x), model.encoder(x)[:, :16])


def test_sample_is_mean_plus_noise_times_standard_deviation() -> None:
    moments = torch.cat(
        [torch.full((1, 2, 3, 3), 5.0), torch.full((1, 2, 3, 3), 2.0 * torch.log(torch.tensor(3.0)))], 1
    )
    noise = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    sample = latent_from_moments(moments, torch.Generator().manual_seed(1))
    assert torch.allclose(sample, 5.0 + 3.0 * noise, atol=1e-5)
    assert torch.equal(latent_from_moments(moments), moments[:, :2])


@pytest.mark.parametrize(("logvar", "std"), [(1e4, torch.tensor(10.0).exp()), (-1e4, torch.tensor(-15.0).exp())])
def test_extreme_log_variance_is_clamped(logvar: float, std: torch.Tensor) -> None:
    moments = torch.cat([torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), logvar)], 1)
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(latent_from_moments(moments, torch.Generator().manual_seed(1)), std * noise)


def test_downsample_pads_on_the_right_and_the_bottom_only() -> None:
    layer = Downsample(1)
    layer.conv.weight.zero_()
    layer.conv.weight[0, 0, 0, 0] = 1.0  # picks the top left of each 3x3 window
    layer.conv.bias.zero_()
    x = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(layer(x), x[:, :, ::2, ::2])


def test_attention_weighs_all_pixels_by_softmax() -> None:
    layer = AttnBlock(32)
    x = torch.randn(2, 32, 3, 5)
    h = layer.norm(x)
    q, k, v = (getattr(layer, name)(h).flatten(2) for name in "qkv")  # [B, c, h*w]
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 32**0.5, dim=-1)
    expected = x + layer.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_resnet_block_adds_its_shortcut() -> None:
    block = ResnetBlock(32, 64)
    block.conv2.weight.zero_()
    block.conv2.bias.zero_()
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(block(x), F.conv2d(x, block.nin_shortcut.weight, block.nin_shortcut.bias))


def test_features_are_everything_before_the_last_convolution(toy_vae: AutoencoderConfig) -> None:
    encoder = Autoencoder(toy_vae).eval().encoder
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(encoder.conv_out(encoder.features(x)), encoder(x))
    assert torch.equal(encoder.finish(encoder.levels(x)), encoder.features(x))


def test_decoder_does_not_clamp(toy_vae: AutoencoderConfig) -> None:
    model = Autoencoder(toy_vae).eval()
    model.decoder.conv_out.bias.fill_(9.0)
    assert model.decode(torch.randn(1, 16, 2, 2)).min() > 1


@pytest.mark.parametrize("widths", [(), (48,), (0, 32), (-32,)])
def test_widths_that_group_norm_cannot_split_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(DAVAEError, match="multiples of 32"):
        AutoencoderConfig(widths=widths)


@pytest.mark.parametrize("bad", [{"blocks": 0}, {"latent_channels": 0}, {"image_channels": 0}])
def test_empty_shapes_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(DAVAEError, match="at least one"):
        AutoencoderConfig(**bad)


@pytest.mark.parametrize("missing", ["encoder.conv_in.weight", "encoder.conv_out.weight"])
def test_a_missing_tensor_is_named(toy_vae: AutoencoderConfig, missing: str) -> None:
    state = Autoencoder(toy_vae).state_dict()
    del state[missing]
    with pytest.raises(CheckpointError, match=missing):
        AutoencoderConfig.from_state_dict(state)


def test_configuration_is_read_at_a_prefix(toy_vae: AutoencoderConfig) -> None:
    state = {f"first_stage_model.{name}": t for name, t in Autoencoder(toy_vae).state_dict().items()}
    assert AutoencoderConfig.from_state_dict(state, "first_stage_model.encoder.") == toy_vae


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (8, 8)])
def test_enlarging_is_the_same_with_and_without_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = Upsample(16), torch.randn(2, 16, *size)
    with torch.enable_grad():
        plain = layer(x)
    with torch.no_grad():
        quick = layer(x)
    assert plain.requires_grad and plain.std() > 0.1
    torch.testing.assert_close(quick, plain.detach(), atol=1e-5, rtol=1e-5)


def test_what_works_in_place_leaves_its_input_alone() -> None:
    torch.manual_seed(0)
    vae, z, x = Autoencoder(AutoencoderConfig((32, 32), 1)).eval(), torch.randn(1, 16, 4, 4), torch.randn(1, 32, 8, 8)
    z_before, x_before = z.clone(), x.clone()
    with torch.no_grad():
        vae.decode(z)
        vae.decoder.up[0].block[0](x)
    assert torch.equal(z, z_before) and torch.equal(x, x_before)
