"""The detail predictor: shapes, units, files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints
from davae_core.checkpoints import files
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError, LatentError
from davae_core.latent import LatentSpec
from davae_core.predictor import DetailPredictor, PredictorConfig

UNITS = LatentSpec(detail_mean=(0.3,) * 16, detail_std=tuple(0.5 + 0.1 * i for i in range(16)))


@pytest.fixture
def predictor() -> DetailPredictor:
    """One that predicts something, in units of its own."""
    torch.manual_seed(0)
    made = DetailPredictor(PredictorConfig(UNITS, width=64, blocks=2)).eval()
    torch.nn.init.normal_(made.conv_out.weight, std=0.1)
    return made


def test_a_new_one_predicts_the_mean_of_each_channel() -> None:
    fresh = DetailPredictor(PredictorConfig(UNITS, width=64, blocks=1))
    z = fresh.complete(torch.randn(2, 16, 4, 6))
    assert z.shape == (2, 32, 4, 6) and torch.allclose(z[:, 16:], torch.tensor(0.3))


def test_the_base_is_kept_bit_for_bit_and_the_detail_is_in_the_autoencoders_units(predictor: DetailPredictor) -> None:
    base = torch.randn(2, 16, 4, 6)
    z = predictor.complete(base)
    assert torch.equal(z[:, :16], base)
    told = UNITS.normalise(z)
    assert torch.allclose(told[:, 16:], predictor(UNITS.normalise_base(base)), atol=1e-5)
    assert told[:, 16:].std() > 0.01


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (64, 64)])
def test_any_size_fits(predictor: DetailPredictor, size: tuple[int, int]) -> None:
    assert predictor.complete(torch.randn(1, 16, *size)).shape == (1, 32, *size)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 32, 8, 8), (16, 8, 8), (0, 16, 8, 8), (1, 16, 0, 8)])
def test_what_is_no_base_latent_is_named(predictor: DetailPredictor, shape: tuple[int, ...]) -> None:
    with pytest.raises(LatentError, match=r"base latent has shape .*expected \[batch, 16, height, width\]"):
        predictor.complete(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_latent_keeps_its_dtype(predictor: DetailPredictor, dtype: torch.dtype) -> None:
    base = torch.randn(1, 16, 4, 4)
    expected = predictor.complete(base)
    z = predictor.complete(base.to(dtype))
    assert z.dtype == dtype and torch.equal(z[:, :16], base.to(dtype))
    assert torch.allclose(z.float(), expected, atol=0.05)
    assert torch.allclose(predictor.to(torch.bfloat16).complete(base), expected, atol=0.1)


def test_a_file_gives_it_back(predictor: DetailPredictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    checkpoints.save_predictor(path, predictor)
    again = checkpoints.load_predictor(path)
    assert again.config == predictor.config
    base = torch.randn(1, 16, 4, 4)
    assert torch.equal(again.complete(base), predictor.complete(base))
    assert checkpoints.load_predictor(path, torch.float16).conv_in.weight.dtype == torch.float16


def test_other_files_are_named(predictor: DetailPredictor, make_davae: Callable[..., DAVAE], tmp_path: Path) -> None:
    davae, path = tmp_path / "davae.safetensors", tmp_path / "predictor.safetensors"
    checkpoints.save_autoencoder(davae, make_davae())
    checkpoints.save_predictor(path, predictor)
    with pytest.raises(
        CheckpointError,
        match=r"davae\.safetensors is a DA-VAE autoencoder; choose a DA-VAE detail predictor \(models/latent_upscale",
    ):
        checkpoints.load_predictor(davae)
    with pytest.raises(
        CheckpointError, match=r"predictor\.safetensors is a DA-VAE detail predictor; choose a DA-VAE autoencoder"
    ):
        checkpoints.load_autoencoder(path)


def test_a_damaged_file_is_named(predictor: DetailPredictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    checkpoints.save_predictor(path, predictor)
    state, info = files.read(path)
    for name, change, said in (
        ("conv_out.weight", lambda t: t[:10], "expected a multiple of 16"),
        ("blocks.1.conv1.weight", lambda t: t[:, :8], r"blocks\.1\.conv1\.weight"),
        ("conv_in.weight", lambda t: t * float("nan"), "NaN"),
    ):
        files.save(path, {**state, name: change(state[name]).contiguous()}, info)
        with pytest.raises(CheckpointError, match=rf"predictor\.safetensors.*{said}"):
            checkpoints.load_predictor(path)
