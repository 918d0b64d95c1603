"""FLUX.1's VAE, which has SD3's shapes, as a base of stage 1 and of a predictor: the units decide, and are checked."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import bases, checkpoints
from davae_core.checkpoints import files
from davae_core.errors import DAVAEError
from davae_core.latent import LatentSpec
from davae_core.predictor import PredictorConfig
from davae_core.training import recipes
from davae_core.training import stages as entry
from davae_core.training.pretrained import base_of_file
from davae_core.training.recipes import flux_vae, sd3_vae
from davae_core.training.run import config
from davae_core.training.tasks.begin import check_units
from davae_core.training.tasks.predictor import check_continues
from harness.layouts import random_vae

FLUX = (0.1159, 0.3611)
SMALL = "--data.size 32 --data.workers 0 --run.batch 4 --run.micro-batch 0 --run.sample-every 0 --run.log-every 1"
SMALL += " --run.precision fp32 --optimiser.warmup 0 --losses.perceptual 0"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A VAE as FLUX.1's is published: no metadata; its name here tells nothing either."""
    path = tmp_path / "vae.safetensors"
    files.save(path, random_vae("sd3").state_dict(), {})
    return path


def train(stages: Any, stage: str, recipe: str, out: Path, *options: str, steps: int = 2) -> Path:
    told = [
        recipe,
        "--data.images",
        str(stages.images),
        "--run.out",
        str(out),
        "--run.steps",
        str(steps),
        *SMALL.split(),
    ]
    assert entry.run(stage, [*told, *options]) == 0
    return out / entry.STAGES[stage].recipes[recipe][1].file


def test_the_whole_way_of_a_flux_davae(stages: Any, tmp_path: Path, bare: Path) -> None:
    """The recipes decide for a bare file; what they leave is in FLUX.1's units, and so is what is made of it."""
    davae = train(stages, "autoencoder", "flux_vae_f16", tmp_path / "vae", "--base", str(bare))
    assert davae.name == "flux_davae.safetensors"
    spec = checkpoints.load_autoencoder(davae).latent
    assert (spec.base_shift, spec.base_scale, spec.channels, spec.factor) == (*FLUX, 32, 16)
    given = ("--base", str(bare), "--start", str(davae))
    robust = train(stages, "autoencoder", "flux_vae_f16_robust", tmp_path / "robust", *given)
    assert checkpoints.load_autoencoder(robust).latent == spec
    small = ("--width", "32", "--blocks", "1")
    made = train(stages, "predictor", "flux_predictor", tmp_path / "p", "--autoencoder", str(robust), *small)
    predictor = checkpoints.load_predictor(made)
    assert made.name == "flux_predictor.safetensors" and predictor.latent == spec
    assert predictor.complete(torch.randn(1, 16, 2, 2)).shape == (1, 32, 2, 2)


@pytest.mark.parametrize(
    ("file", "told", "recipe", "said"),
    [
        ("vae", {"modelspec.architecture": "flux-1-dev"}, "sd3_vae_f16", r"FLUX\.1 \(told by its metadata\), but"),
        ("ae", {}, "sd3_vae_f16", r"FLUX\.1 \(told by its name\), but --family sd3 asks for that of SD3"),
        ("flux_ae", {}, "sd3_vae_f16", r"or take --family flux1, or a recipe for FLUX\.1"),
        ("sd3_vae", {}, "flux_vae_f16", r"VAE of SD3 / SD3\.5 \(told by its name\), but --family flux1"),
        ("x", {"davae.base": "sd3"}, "flux_vae_f16", r"convert x\.safetensors right.* --family flux1"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_the_recipe_is_refused(
    stages: Any, tmp_path: Path, file: str, told: dict[str, str], recipe: str, said: str
) -> None:
    path = tmp_path / f"{file}.safetensors"
    files.save(path, random_vae("sd3").state_dict(), told)
    with pytest.raises(DAVAEError, match=said):
        train(stages, "autoencoder", recipe, tmp_path / "out", "--base", str(path))
    assert not (tmp_path / "out").exists()


def test_where_the_recipe_does_not_say_the_file_decides(tmp_path: Path) -> None:
    vae = random_vae("sd3")
    for name, expected in (("vae", bases.SD3), ("ae", bases.FLUX1), ("z_image_vae", bases.FLUX1)):
        files.save(tmp_path / f"{name}.safetensors", vae.state_dict(), {})
        assert base_of_file(tmp_path / f"{name}.safetensors", vae.config) is expected
    with pytest.raises(DAVAEError, match=r"vae\.safetensors: .*no base model 'flux', expected one of .*flux1"):
        base_of_file(tmp_path / "vae.safetensors", vae.config, "flux")
    sd1 = random_vae("sd1")
    files.save(tmp_path / "sd1.safetensors", sd1.state_dict(), {})
    with pytest.raises(DAVAEError, match=r"sd1\.safetensors: the VAE is not that of FLUX\.1: 16 channels"):
        base_of_file(tmp_path / "sd1.safetensors", sd1.config, "flux1")


def test_a_start_or_davae_in_the_units_of_another_base_is_refused(stages: Any, tmp_path: Path, bare: Path) -> None:
    davae = train(stages, "autoencoder", "sd3_vae_f16", tmp_path / "vae", "--base", str(bare), steps=1)
    said = r"sd35_davae\.safetensors is a DA-VAE on the VAE of SD3 / SD3\.5 \(shift 0\.0609, .*--family flux1 asks for"
    given = ("--base", str(bare), "--start", str(davae))
    with pytest.raises(DAVAEError, match=said):
        train(stages, "autoencoder", "flux_vae_f16_robust", tmp_path / "robust", *given)
    with pytest.raises(DAVAEError, match=said):
        train(stages, "predictor", "flux_predictor", tmp_path / "predictor", "--autoencoder", str(davae))
    with pytest.raises(DAVAEError, match=said):
        train(stages, "tiny_decoder", "flux_tiny_decoder", tmp_path / "tiny", "--autoencoder", str(davae))
    # Under a DA-VAE lies its base's VAE, in the units that it was trained in.
    with pytest.raises(DAVAEError, match=r"VAE of SD3 / SD3\.5 \(told by the units of its latent\)"):
        train(stages, "autoencoder", "flux_vae_f16", tmp_path / "again", "--base", str(davae))


def test_an_sd3_model_is_not_trained_on_flux_s_latents(stages: Any, tmp_path: Path) -> None:
    davae = checkpoints.load_autoencoder(stages.file("autoencoder"), torch.float32)
    davae.set_base_units(*FLUX)
    checkpoints.save_autoencoder(tmp_path / "davae.safetensors", davae)
    said = r"davae\.safetensors is a DA-VAE on the VAE of FLUX\.1 .*but the model \(--model\) draws latents of SD3"
    with pytest.raises(DAVAEError, match=said):
        stages.run("adapter", tmp_path / "adapter", 1, "--autoencoder", str(tmp_path / "davae.safetensors"))
    tensors, _ = files.read(stages.file("base_autoencoder"))
    files.save(tmp_path / "ae.safetensors", tensors, {})
    with pytest.raises(DAVAEError, match=r"FLUX\.1 \(told by its name\), but --family sd3"):
        stages.run("base_dit", tmp_path / "dit", 1, "--autoencoder", str(tmp_path / "ae.safetensors"))


@pytest.mark.parametrize("other", [{"base_shift": FLUX[0], "base_scale": FLUX[1]}, {"detail_std": (2.0,) * 16}])
def test_a_predictor_goes_on_in_its_own_units_alone(other: dict[str, Any]) -> None:
    own = PredictorConfig(LatentSpec())
    check_continues(own, own)
    with pytest.raises(DAVAEError, match="is for another DA-VAE: the units of"):
        check_continues(own, PredictorConfig(LatentSpec(**other)))


def test_recomputation_changes_no_loss_of_a_predictor(stages: Any, tmp_path: Path) -> None:
    for name, more in (("plain", "--no-gradient-checkpointing"), ("again", "--gradient-checkpointing")):
        given = (
            "--autoencoder",
            str(stages.file("autoencoder")),
            "--width",
            "32",
            "--blocks",
            "1",
            "--losses.l1",
            "1",
            more,
        )
        train(stages, "predictor", "micro", tmp_path / name, *given)
    one, two = (stages.curves(tmp_path / name) for name in ("plain", "again"))
    assert one == two and one["predictor/l1"][2] > 0


# Units against what the images' latents show


@pytest.mark.parametrize(
    ("std", "units", "near"),
    [
        (1 / 0.3611, bases.SD3.normalisation, r"deviation 4\.2. in the units of SD3.*FLUX\.1 it is 1\.00.*y flux1"),
        (1 / 1.5305, FLUX, r"deviation 0\.24 in the units of FLUX\.1.*SD3\.5 it is 1\.00.*--family sd3"),
        (1 / 1.5305, bases.SD3.normalisation, None),
        (1 / 0.3611, FLUX, None),
        (0.5 / 0.3611, FLUX, None),  # of flat images
        (0.01, bases.SD3.normalisation, None),  # the other's are farther off still
        (1 / 0.3611, ((0.0,) * 16, (1.0,) * 16), None),  # measured units are right
    ],
)  # fmt: skip
def test_units_that_look_like_another_bases_are_warned_of(
    std: float, units: Any, near: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    z = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(0)) * std
    with caplog.at_level(logging.WARNING):
        check_units(z, LatentSpec(base_shift=units[0], base_scale=units[1]))
    assert bool(caplog.records) == (near is not None)
    if near is not None:
        assert re.search(near, caplog.records[0].getMessage())


def test_a_training_says_once_that_its_units_look_wrong(
    stages: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vae = random_vae("sd3")
    state = vae.state_dict()
    with torch.no_grad():
        state["encoder.conv_out.weight"] *= 3.0 / vae.encode(torch.rand(2, 3, 32, 32) * 2 - 1).std()
    files.save(tmp_path / "vae.safetensors", state, {})
    with caplog.at_level(logging.WARNING):
        train(stages, "autoencoder", "sd3_vae_f16", tmp_path / "out", "--base", str(tmp_path / "vae.safetensors"))
    assert len([r for r in caplog.records if "--family flux1" in r.getMessage()]) == 1


# Recipes


def test_the_recipes_for_flux_are_those_for_sd3_but_for_the_units() -> None:
    pairs = [
        (flux_vae.FLUX_VAE_F16, sd3_vae.SD3_VAE_F16),
        (flux_vae.FLUX_VAE_F16_ROBUST, sd3_vae.SD3_VAE_F16_ROBUST),
        (flux_vae.FLUX_PREDICTOR, sd3_vae.SD3_PREDICTOR),
        (flux_vae.FLUX_TINY_DECODER, sd3_vae.SD3_TINY_DECODER),
    ]
    for flux, sd3 in pairs:
        one, two = config.flat(flux), config.flat(sd3)
        assert {name for name in one if one[name] != two[name]} == {"family", "file", "run.out"}
        assert (flux.family, sd3.family) == ("flux1", "sd3")
    assert {"flux_vae_f16", "flux_vae_f16_robust"} <= recipes.AUTOENCODER.keys()
    assert {"sd3_predictor", "flux_predictor"} <= recipes.PREDICTOR.keys()
    places = [recipe.run.out for recipe, _ in pairs] + [recipe.run.out for _, recipe in pairs]
    assert len(set(places)) == 8, "no recipe writes into another's folder"
