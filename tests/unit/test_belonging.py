"""Which base model a file's VAE is of, by what the file tells, and what the tools make of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import convert, files, inspect
from davae_core.checkpoints.belonging import Belonging, belonging
from davae_core.checkpoints.opening import open_any
from davae_core.davae import DAVAE
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT
from davae_core.predictor import DetailPredictor, PredictorConfig

VAE = AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1)  # SD3's and FLUX.1's channels and factor
FLUX = LatentSpec(base_shift=0.1159, base_scale=0.3611)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return Autoencoder(VAE).state_dict()


@pytest.mark.parametrize(
    ("file", "told", "expected"),
    [
        ("vae.safetensors", {}, Belonging()),
        ("ae.safetensors", {}, Belonging("flux1", "its name")),
        ("sd3_vae.safetensors", {}, Belonging("sd3", "its name")),
        ("vae.safetensors", {"modelspec.architecture": "flux-1-dev"}, Belonging("flux1", "its metadata")),
        ("ae.safetensors", {"davae.base": "sd3"}, Belonging("sd3", "its metadata")),
    ],
)
def test_metadata_goes_before_the_name(
    tmp_path: Path, state: dict[str, torch.Tensor], file: str, told: dict[str, str], expected: Belonging
) -> None:
    files.save(tmp_path / file, state, told)
    assert belonging(open_any(tmp_path / file)) == expected


def test_the_vae_of_an_sd3_checkpoint_is_sd3s_whatever_its_file_is_called(
    tmp_path: Path, state: dict[str, torch.Tensor], mmdit: MMDiT
) -> None:
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in mmdit.state_dict().items()}
    whole |= {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    files.save(tmp_path / "like_flux.safetensors", whole, {})
    assert belonging(open_any(tmp_path / "like_flux.safetensors")).name == "sd3"


def test_the_vae_of_a_flux_checkpoint_is_found_under_its_own_prefix(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    """Whole checkpoints of FLUX.1 and its kin keep the VAE below ``vae.``."""
    whole = {f"vae.{name}": tensor for name, tensor in state.items()}
    whole |= {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(1, 1)}
    files.save(tmp_path / "flux1-dev-fp8.safetensors", whole, {})
    opened = open_any(tmp_path / "flux1-dev-fp8.safetensors")
    assert opened.detected.description.startswith("a checkpoint with a VAE of 16 latent channels")
    assert belonging(opened).name == "flux1"
    assert set(opened.parts["vae"].native) == set(state)


def test_the_vae_beside_a_transformer_that_is_not_known_is_read(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """A folder of diffusers' FluxPipeline."""
    files.save(tmp_path / "ae.safetensors", state, {})
    convert.main([str(tmp_path / "ae.safetensors"), str(tmp_path / "pipeline"), "--to", "diffusers"])
    transformer = tmp_path / "pipeline" / "transformer"
    transformer.mkdir()
    files.save(transformer / "diffusion_pytorch_model.safetensors", {"x_embedder.weight": torch.zeros(1)}, {})
    opened = open_any(tmp_path / "pipeline")
    assert belonging(opened) == Belonging("flux1", "its metadata")  # the units in config.json
    convert.main([str(tmp_path / "pipeline"), str(tmp_path / "vae.safetensors")])
    found = files.read(tmp_path / "vae.safetensors")
    assert found[1]["davae.base"] == "flux1"
    assert all(torch.equal(found[0][name], state[name]) for name in state)


def test_a_bare_file_called_as_fluxs_is_converted_in_fluxs_units(
    tmp_path: Path, state: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    units = {}
    for name in ("ae", "vae"):
        files.save(tmp_path / f"{name}.safetensors", state, {})
        convert.main([str(tmp_path / f"{name}.safetensors"), str(tmp_path / name), "--to", "diffusers"])
        config = json.loads((tmp_path / name / "vae" / "config.json").read_text())
        units[name] = config["shift_factor"], config["scaling_factor"]
        said = capsys.readouterr().out
        told = "nothing tells whether it is of SD3 / SD3.5 or of FLUX.1; shift 0.0609" in said
        assert told == (name == "vae"), "what is guessed is said"
    assert units == {"ae": (0.1159, 0.3611), "vae": (0.0609, 1.5305)}


def test_family_mends_a_file_that_is_wrong_about_itself(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    files.save(tmp_path / "wrong.safetensors", state, {"davae.base": "sd3"})
    options = ["--part", "vae", "--family", "flux1"]
    convert.main([str(tmp_path / "wrong.safetensors"), str(tmp_path / "right.safetensors"), *options])
    assert belonging(open_any(tmp_path / "right.safetensors")) == Belonging("flux1", "its metadata")


def test_inspect_names_the_base_of_all_that_is_made_for_it(
    tmp_path: Path, make_davae: Callable[..., DAVAE], capsys: pytest.CaptureFixture[str]
) -> None:
    davae = make_davae(base_decoder=True)
    davae.set_base_units(FLUX.base_shift, FLUX.base_scale)
    checkpoints.save_autoencoder(tmp_path / "a.safetensors", davae)
    predictor = DetailPredictor(PredictorConfig(FLUX, width=64, blocks=2))
    checkpoints.save_predictor(tmp_path / "p.safetensors", predictor)
    checkpoints.save_predictor(tmp_path / "sd3.safetensors", DetailPredictor(PredictorConfig(width=64, blocks=2)))
    told = {path.stem: inspect.main([str(path)]) for path in sorted(tmp_path.glob("*.safetensors"))}
    base = {"name": "flux1", "title": "FLUX.1", "by": "the units of its latent"}
    assert told["a"]["base"] == told["p"]["base"] == base
    assert told["sd3"]["base"]["name"] == "sd3"
    assert (told["p"]["config"]["width"], told["p"]["config"]["blocks"]) == (64, 2)
    assert told["p"]["config"]["latent"]["base_scale"] == 0.3611
    said = capsys.readouterr().out
    assert said.count("base: the VAE of FLUX.1 (flux1), told by the units of its latent") == 2


def test_inspect_names_no_base_that_is_not_told(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    files.save(tmp_path / "vae.safetensors", state, {})
    told = inspect.main([str(tmp_path / "vae.safetensors")])
    assert told["base"] is None and "like SD3 / SD3.5 or FLUX.1's" in told["description"]
