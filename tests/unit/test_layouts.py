"""The full-size models carry exactly the tensor names and shapes of the published files."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig

Layout = dict[str, tuple[int, ...]]

SD35_MEDIUM = MMDiTConfig()
SD35_LARGE = MMDiTConfig(hidden=2432, depth=38, grid=192, dual_attention=())
SD3_MEDIUM = MMDiTConfig(grid=192, dual_attention=(), qk_norm=False)


def read_layout(path: Path) -> Layout:
    """Lines ``name shape``; ``{a-b}`` in a name stands for every index from a to b; ``#`` starts a comment."""
    layout: Layout = {}
    for line in path.read_text().splitlines():
        if line := line.split("#")[0].strip():
            name, shape = line.split()
            for one in expand(name):
                assert one not in layout, f"{one} is listed twice"
                layout[one] = tuple(int(side) for side in shape.split(","))
    return layout


def expand(name: str) -> list[str]:
    span = re.search(r"\{(\d+)-(\d+)\}", name)
    if span is None:
        return [name]
    first, last = int(span[1]), int(span[2])
    return [tail for i in range(first, last + 1) for tail in expand(f"{name[: span.start()]}{i}{name[span.end() :]}")]


def layout_of(module: torch.nn.Module) -> Layout:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def on_meta(kind: type[torch.nn.Module], config: object) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(config)


def below(layout: Layout, prefix: str) -> Layout:
    return {name.removeprefix(prefix): shape for name, shape in layout.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def sd35(root: Path) -> Layout:
    return read_layout(root / "tests/data/sd35_medium_layout.txt")


@pytest.fixture(scope="module")
def sd3_vae(root: Path) -> Layout:
    return read_layout(root / "tests/data/sd3_vae_layout.txt")


def test_ranges_in_a_layout_include_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "layout.txt"
    path.write_text("# about\na.{1-2}.b.{0-1} 3,4\n\nc 5  # one\n")
    expected = dict.fromkeys(("a.1.b.0", "a.1.b.1", "a.2.b.0", "a.2.b.1"), (3, 4)) | {"c": (5,)}
    assert read_layout(path) == expected


def test_mmdit_is_sd35_medium_name_by_name(sd35: Layout) -> None:
    assert layout_of(on_meta(MMDiT, SD35_MEDIUM)) == sd35
    assert len(sd35) == 665
    assert sum(map(math.prod, sd35.values())) == 2_469_663_936


def test_autoencoder_is_the_sd3_vae_name_by_name(sd3_vae: Layout) -> None:
    assert layout_of(on_meta(Autoencoder, AutoencoderConfig())) == sd3_vae
    assert len(sd3_vae) == 244
    assert sum(map(math.prod, sd3_vae.values())) == 83_819_683


def test_published_shapes_give_the_default_configurations(sd35: Layout, sd3_vae: Layout) -> None:
    def tensors(layout: Layout) -> dict[str, torch.Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in layout.items()}

    assert MMDiTConfig.from_state_dict(tensors(sd35)) == SD35_MEDIUM
    assert AutoencoderConfig.from_state_dict(tensors(sd3_vae)) == AutoencoderConfig()


@pytest.mark.parametrize("config", [SD35_LARGE, SD3_MEDIUM, replace(SD35_MEDIUM, in_channels=32, out_channels=32)])
def test_shapes_of_other_models_give_their_configuration(config: MMDiTConfig) -> None:
    state = on_meta(MMDiT, config).state_dict()
    assert MMDiTConfig.from_state_dict(state) == config
    assert any("attn2" in name for name in state) == bool(config.dual_attention)
    assert any("ln_q" in name for name in state) == config.qk_norm


@pytest.mark.parametrize(
    "config",
    [AutoencoderConfig(widths=(32, 64, 96), blocks=3, latent_channels=4), AutoencoderConfig((64,), 1, 8, 1)],
)
def test_shapes_of_other_autoencoders_give_their_configuration(config: AutoencoderConfig) -> None:
    assert AutoencoderConfig.from_state_dict(on_meta(Autoencoder, config).state_dict()) == config


def test_davae_keeps_the_sd3_vae_and_adds_two_convolutions(sd3_vae: Layout) -> None:
    layout = layout_of(on_meta(DAVAE, DAVAEConfig()))
    assert below(layout, "base_encoder.") == below(sd3_vae, "encoder.")
    decoder = below(sd3_vae, "decoder.")
    assert below(layout, "decoder.") == {name: decoder[name] for name in decoder if not name.startswith("conv_in.")}
    rest = {name: layout[name] for name in layout if not name.startswith(("base_encoder.", "decoder."))}
    assert rest == {
        "detail_down.conv.weight": (8, 512, 3, 3),
        "detail_down.conv.bias": (8,),
        "joint_up.conv.weight": (2048, 32, 3, 3),
        "joint_up.conv.bias": (2048,),
    }


def test_optional_parts_of_davae_carry_sd3_vae_names(sd3_vae: Layout) -> None:
    layout = layout_of(on_meta(DAVAE, DAVAEConfig(shared_trunk=False, base_decoder=True)))
    encoder = below(sd3_vae, "encoder.")
    trunk = {name: encoder[name] for name in encoder if not name.startswith("conv_out.")}
    assert below(layout, "detail_trunk.") == trunk
    assert below(layout, "base_decoder.") == below(sd3_vae, "decoder.")


@pytest.mark.parametrize(("detail", "scale"), [(16, 2), (96, 2), (16, 4), (64, 4)])
def test_davae_convolutions_follow_detail_channels_and_scale(detail: int, scale: int) -> None:
    config = DAVAEConfig(latent=LatentSpec(detail_channels=detail, scale=scale))
    model = on_meta(DAVAE, config)
    layout = layout_of(model)
    assert layout["detail_down.conv.weight"] == (2 * detail // scale**2, 512, 3, 3)
    assert layout["joint_up.conv.weight"] == (512 * scale**2, 16 + detail, 3, 3)
    assert DAVAEConfig.from_state_dict(model.state_dict()) == config


@pytest.mark.parametrize("shared_trunk", [True, False])
@pytest.mark.parametrize("base_decoder", [True, False])
def test_shapes_of_davae_give_its_configuration(shared_trunk: bool, base_decoder: bool) -> None:
    config = DAVAEConfig(shared_trunk=shared_trunk, base_decoder=base_decoder)
    assert DAVAEConfig.from_state_dict(on_meta(DAVAE, config).state_dict()) == config
