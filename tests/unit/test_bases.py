"""Which base model a VAE belongs to, and the units of its latents: the table, the rule, the errors."""

from dataclasses import replace

import pytest
import torch

from davae_core.autoencoder import AutoencoderConfig
from davae_core.bases import (
    BASES,
    FLUX1,
    MMDIT,
    SD1,
    SD3,
    SDXL,
    VAVAE,
    Base,
    base_by_file_name,
    base_of,
    base_of_latent,
    name_of_units,
    normalisation_by_shape,
)
from davae_core.errors import DAVAEError
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig

SD_VAE = AutoencoderConfig((32, 32, 64, 64), 1, latent_channels=4, quant_conv=True)
SD3_VAE = AutoencoderConfig((32, 32, 64, 64), 1)
VA_VAE = AutoencoderConfig((32, 32, 64, 64, 128), 1, latent_channels=32, quant_conv=True, attention=(4,))
UNKNOWN = AutoencoderConfig((32, 32, 64), 1, latent_channels=3, quant_conv=True)


@pytest.mark.parametrize(("config", "base"), [(SD3_VAE, SD3), (VA_VAE, VAVAE)])
def test_shapes_tell_the_base_where_one_alone_has_them(config: AutoencoderConfig, base: object) -> None:
    assert base_of(config) is base


def test_sd1_and_sdxl_are_not_guessed() -> None:
    with pytest.raises(DAVAEError, match=r"SD1 / SD2 or of SDXL.*`family` set to sd1 or sdxl.*davae\.base"):
        base_of(SD_VAE)
    assert normalisation_by_shape(SD_VAE) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({"davae.base": "sdxl"}, SDXL),
        ({"davae.base": "sd1", "modelspec.architecture": "stable-diffusion-xl-v1-base"}, SD1),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, SDXL),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, SD1),
        ({"davae.base": "flux1"}, FLUX1),
        ({"modelspec.architecture": "flux-1-dev"}, FLUX1),
        ({"modelspec.architecture": "lumina-2"}, FLUX1),
        ({"modelspec.architecture": "stable-diffusion-v3.5-medium"}, SD3),
    ],
)
def test_the_metadata_of_the_file_tells_them_apart(metadata: dict[str, str], base: object) -> None:
    vae = SD_VAE if base in (SD1, SDXL) else SD3_VAE
    assert base_of(vae, metadata=metadata) is base


@pytest.mark.parametrize(
    ("file", "base"),
    [
        ("ae.safetensors", "flux1"),
        ("ae.sft", "flux1"),
        ("FLUX.1-dev_vae.safetensors", "flux1"),
        ("flux1-dev-fp8.safetensors", "flux1"),
        ("z_image_turbo.safetensors", "flux1"),
        ("sd3_vae.safetensors", "sd3"),
        ("sd3.5_medium.safetensors", "sd3"),
        ("stable-diffusion-3.5-large", "sd3"),
        ("vae.safetensors", ""),
        ("ae2.safetensors", ""),
        ("illuminati_influx.safetensors", ""),  # words, not letters in others
        ("sd3_to_flux.safetensors", ""),  # of two names neither counts
    ],
)
def test_the_name_of_the_file_tells_flux_from_sd3(file: str, base: str) -> None:
    assert base_by_file_name(SD3_VAE, file) == base
    assert base_by_file_name(SD_VAE, file) == ""  # the shapes have to fit


def test_what_the_user_names_goes_before_the_metadata() -> None:
    assert base_of(SD_VAE, "sd1", {"davae.base": "sdxl"}) is SD1


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("sd4", {}, "no base model 'sd4', expected one of sd1, sdxl, sd3, vavae, flux1"),
        ("", {"davae.base": "other"}, "no base model 'other'"),
        ("", {"davae.base": "units:0.0,0.0"}, "no base model 'units:0.0,0.0'"),
        ("", {"davae.base": "units:nan,1"}, "no base model 'units:nan,1'"),
        ("", {"davae.base": "units:1"}, "no base model 'units:1'"),
        ("vavae", {}, "not that of VA-VAE: 32 channels at 1/16, with quant_conv, got 4 channels at 1/8"),
    ],
)
def test_a_wrong_name_is_refused(name: str, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(DAVAEError, match=message):
        base_of(SD_VAE, name, metadata)


@pytest.mark.parametrize("units", [(0.0, 1.0), (-0.5, 1e-3), (0.1159, 0.3611)])
def test_units_are_known_again_by_the_name_that_is_made_of_them(units: tuple[float, float]) -> None:
    base = base_of(SD3_VAE, metadata={"davae.base": name_of_units(16, *units)})
    assert base.normalisation == units and base.fits(SD3_VAE)
    assert (base is FLUX1) == (units == FLUX1.normalisation)


def test_an_unknown_vae_has_no_units() -> None:
    base = base_of(UNKNOWN)
    assert (base.name, base.normalisation) == ("", None)
    assert base.fits(UNKNOWN) and not base.fits(replace(UNKNOWN, quant_conv=False))


@pytest.mark.parametrize("base", [SD1, SDXL, SD3, FLUX1])
def test_a_latent_of_known_units_tells_its_base(base: object) -> None:
    assert base_of_latent(base.latent_channels, base.factor, base.normalisation) is base
    assert base_of_latent(base.latent_channels, base.factor, (0.0, 1.0)) is None


@pytest.mark.parametrize("config", [SD3_VAE, VA_VAE, UNKNOWN], ids=["sd3", "vavae", "unknown"])
def test_a_new_row_changes_no_other_rows_units(monkeypatch: pytest.MonkeyPatch, config: AutoencoderConfig) -> None:
    """FLUX.1's VAE has SD3's shapes. A row counts by its shapes only where it says so."""
    base, units = base_of(config), normalisation_by_shape(config)
    new = Base("new", "New", config.latent_channels, config.factor, config.quant_conv, (1.0, 2.0))
    monkeypatch.setitem(BASES, "new", new)
    assert base_of(config) == base and normalisation_by_shape(config) == units
    assert base_of(config, "new") is new
    assert [name for name, row in BASES.items() if row.by_shape] == ["sd1", "sdxl", "sd3", "vavae"]


def test_the_units_are_those_of_the_releases() -> None:
    assert {name: base.normalisation for name, base in BASES.items()} == {
        "sd1": (0.0, 0.18215),
        "sdxl": (0.0, 0.13025),
        "sd3": (0.0609, 1.5305),
        "vavae": None,
        "flux1": (0.1159, 0.3611),
    }


def test_the_names_of_the_diffusion_model_are_its_own() -> None:
    with torch.device("meta"):
        names = set(MMDiT(MMDiTConfig(hidden=128, depth=3, grid=8, dual_attention=(0,))).state_dict())
    assert MMDIT.mark in names
    assert {f"{part}{kind}" for part in (MMDIT.embedder, MMDIT.head) for kind in ("weight", "bias")} <= names
    for module, (weight, _) in MMDIT.lora_modules.items():
        assert f"{MMDIT.block.format(0)}{weight}.weight" in names
        in_the_last = f"{MMDIT.block.format(2)}{weight}.weight" in names
        assert in_the_last == (module not in MMDIT.not_in_the_last_block and not module.startswith("attn2."))


# One number, or one for each channel


def test_units_per_channel_normalise_each_channel_by_its_own() -> None:
    shift, scale = (1.0, -2.0, 0.0, 0.5), (1.0, 0.5, 2.0, 4.0)
    spec = LatentSpec(4, 4, base_shift=shift, base_scale=scale)
    z = torch.randn(2, 8, 3, 3)
    expected = torch.stack([(z[:, i] - shift[i]) * scale[i] for i in range(4)], dim=1)
    assert torch.allclose(spec.normalise_base(z[:, :4]), expected)
    assert torch.allclose(spec.normalise(z), torch.cat([expected, z[:, 4:]], dim=1))
    assert torch.allclose(spec.denormalise(spec.normalise(z)), z, atol=1e-6)
    assert torch.allclose(spec.denormalise_base(expected), z[:, :4], atol=1e-6)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"base_shift": (0.0, 0.0)}, "base_shift must be one number or 4, got 2"),
        ({"base_scale": (1.0, 1.0, 0.0, 1.0)}, "above 0"),
        ({"base_shift": (0.0, float("nan"), 0.0, 0.0)}, "finite"),
    ],
)
def test_units_that_make_no_sense_are_refused(units: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(DAVAEError, match=message):
        LatentSpec(4, 4, **units)
