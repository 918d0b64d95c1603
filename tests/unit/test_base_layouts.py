"""The three layouts of base VAEs: their names and sizes, diffusers' own module on the same weights, and strips."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import load_autoencoder, save_autoencoder
from davae_core.checkpoints.detect import detect
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.errors import CheckpointError
from harness.layouts import DETAIL, LAYOUTS, random_vae

MakeDavae = Callable[..., DAVAE]
CASES = [(layout, scale) for layout in LAYOUTS for scale in (2, 4)]
TRUE_WIDTHS = {"sd3": (128, 256, 512, 512), "sd1": (128, 256, 512, 512), "vavae": (128, 128, 256, 256, 512)}

# From the LDM names to diffusers'; decoder levels are also counted from the other end.
TO_DIFFUSERS = [
    (r"(down|up)\.(\d+)\.", r"\1_blocks.\2."),
    (r"block\.(\d+)\.", r"resnets.\1."),
    (r"attn\.(\d+)\.", r"attentions.\1."),
    (r"(downsample|upsample)\.conv", r"\1rs.0.conv"),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"\.norm_out", ".conv_norm_out"),
]


def diffusers_name(name: str, levels: int) -> str:
    for pattern, replacement in TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)


def in_diffusers(model: Autoencoder) -> AutoencoderKL:
    """The same VAE as diffusers builds it."""
    config, levels = model.config, len(model.config.widths)
    own = ["AttnDownEncoderBlock2D" if i in config.attention else "DownEncoderBlock2D" for i in range(levels)]
    theirs = AutoencoderKL(
        down_block_types=tuple(own),
        up_block_types=tuple(name.replace("DownEncoder", "UpDecoder") for name in reversed(own)),
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.quant_conv,
    ).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        name = diffusers_name(name, levels)
        state[name] = tensor.flatten(1) if "attentions" in name and tensor.ndim == 4 else tensor
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_vae_is_that_of_diffusers_on_the_same_weights(layout: str) -> None:
    ours = random_vae(layout)
    theirs = in_diffusers(ours)
    x = torch.rand(2, 3, 48, 80) * 2 - 1
    z = theirs.encode(x).latent_dist
    assert z.mean.std() > 0.05
    assert (ours.encode(x) - z.mean).abs().max() <= 1e-4
    assert (ours.moments(x).chunk(2, dim=1)[1].clamp(-30, 20) - z.logvar).abs().max() <= 1e-4
    sample = torch.randn_like(z.mean)
    image = theirs.decode(sample).sample
    assert image.std() > 0.05
    assert (ours.decode(sample) - image).abs().max() <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_tell_the_layout(layout: str) -> None:
    assert AutoencoderConfig.from_state_dict(random_vae(layout).state_dict()) == LAYOUTS[layout]


# Parameters of the published files.
@pytest.mark.parametrize(("layout", "parameters"), [("sd3", 83_819_683), ("sd1", 83_653_863)])
def test_at_full_width_it_has_the_size_of_the_published_one(layout: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Autoencoder(replace(LAYOUTS[layout], widths=TRUE_WIDTHS[layout]))
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters


def test_va_vae_has_attention_at_the_lowest_of_its_five_levels_alone() -> None:
    with torch.device("meta"):
        layout = {n: tuple(t.shape) for n, t in Autoencoder(LAYOUTS["vavae"]).state_dict().items()}
    attention = {name.split(".norm.")[0] for name in layout if ".attn" in name and ".norm." in name}
    assert attention == {
        *(f"encoder.down.4.attn.{i}" for i in (0, 1)),
        *(f"decoder.up.4.attn.{i}" for i in (0, 1, 2)),
        "encoder.mid.attn_1",
        "decoder.mid.attn_1",
    }
    assert layout["quant_conv.weight"] == (64, 64, 1, 1)
    assert layout["post_quant_conv.weight"] == (32, 32, 1, 1)


def test_a_latent_of_other_channels_than_the_encoders_is_refused() -> None:
    state = random_vae("sd1").state_dict()
    state["quant_conv.weight"] = torch.zeros(6, 8, 1, 1)
    with pytest.raises(CheckpointError, match=r"quant_conv has shape \[6, 8, 1, 1\], expected \[8, 8, 1, 1\]"):
        AutoencoderConfig.from_state_dict(state)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("sd3", "16 latent channels, like SD3 / SD3.5 or FLUX.1's"),
        ("sd1", "4 latent channels, like SD1 / SD2 or SDXL's"),
        ("vavae", "32 latent channels, like VA-VAE's"),
    ],
)
def test_a_plain_vae_is_told_by_name(layout: str, words: str) -> None:
    assert words in detect(random_vae(layout).state_dict()).description


# On each of them a DA-VAE


@pytest.mark.parametrize(("layout", "scale"), CASES)
def test_saved_and_loaded_it_encodes_and_decodes_alike_in_strips(
    make_davae: MakeDavae, picture: Callable[..., torch.Tensor], tmp_path: object, layout: str, scale: int
) -> None:
    config = LAYOUTS[layout]
    model = make_davae(DETAIL[layout], scale, config, layout != "vavae", True)
    save_autoencoder(f"{tmp_path}/davae.safetensors", model)
    loaded = load_autoencoder(f"{tmp_path}/davae.safetensors")
    assert loaded.config == model.config
    factor = config.factor * scale
    assert loaded.latent.factor == factor
    x = picture(2 * factor, factor)
    z = loaded.encode(x)
    assert z.shape == (1, config.latent_channels + DETAIL[layout], 2, 1)
    assert torch.equal(z, model.encode(x))
    y = loaded.decode(z)
    assert y.shape == x.shape
    assert (loaded.encode_tiled(x, rows=24) - z).abs().max() <= 1e-4
    assert (loaded.decode_tiled(z, rows=24) - y).abs().max() <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_base_latent_and_base_picture_are_the_base_vaes_own(layout: str) -> None:
    vae, config = random_vae(layout), LAYOUTS[layout]
    model = DAVAE(DAVAEConfig.from_state_dict(davae_state(vae, DETAIL[layout]))).eval()
    model.load_state_dict(davae_state(vae, DETAIL[layout]))
    x = torch.rand(1, 3, 2 * config.factor, 4 * config.factor) * 2 - 1
    small = model.shrink(x)
    assert torch.equal(model.encode_base(x), vae.encode(small))
    assert torch.equal(model.encode(x)[:, : config.latent_channels], vae.encode(small))
    assert torch.equal(model.decode_base(vae.encode(small)), vae.decode(vae.encode(small)))


def davae_state(vae: Autoencoder, detail: int) -> dict[str, torch.Tensor]:
    """The tensors of a DA-VAE (s = 2) on a VAE, by the documented names."""
    width, channels = vae.config.feature_channels, vae.config.latent_channels
    generator = torch.Generator().manual_seed(1)
    state = {f"base_{name}": tensor for name, tensor in vae.state_dict().items()}
    decoder = vae.decoder.state_dict(prefix="decoder.")
    state |= {name: tensor for name, tensor in decoder.items() if not name.startswith("decoder.conv_in.")}
    state["detail_down.conv.weight"] = 0.02 * torch.randn(2 * detail // 4, width, 3, 3, generator=generator)
    state["detail_down.conv.bias"] = torch.zeros(2 * detail // 4)
    state["joint_up.conv.weight"] = 0.02 * torch.randn(4 * width, channels + detail, 3, 3, generator=generator)
    state["joint_up.conv.bias"] = torch.zeros(4 * width)
    if 4 * width % (2 * detail):
        state["detail_down.shortcut.weight"] = torch.zeros(2 * detail, 4 * width, 1, 1)
    if 4 * width % (channels + detail):
        state["joint_up.shortcut.weight"] = torch.zeros(4 * width, channels + detail, 1, 1)
    return state
