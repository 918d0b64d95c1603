"""A predictor inside a DA-VAE: pictures stay what they are, the latent holds what the predictor does not expect."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.errors import CheckpointError, DAVAEError
from davae_core.history import History, identity, mismatch
from davae_core.latent import LatentSpec, with_zero_detail
from davae_core.predictor import DetailPredictor, PredictorConfig

MEAN, STD = tuple(0.1 * i for i in range(16)), tuple(0.5 + 0.1 * i for i in range(16))


def expecting(spec: LatentSpec) -> DetailPredictor:
    """A predictor of something, none of whose layers is zero."""
    torch.manual_seed(3)
    made = DetailPredictor(PredictorConfig(spec, width=64, blocks=2)).eval()
    torch.nn.init.normal_(made.conv_out.weight, std=0.1)
    torch.nn.init.normal_(made.conv_out.bias, std=0.1)
    return made


@pytest.fixture
def pair(make_davae: Callable[..., DAVAE]) -> tuple[DAVAE, DAVAE, DetailPredictor]:
    """A DA-VAE, the same with a predictor inside, and the predictor."""
    torch.manual_seed(1)
    plain = make_davae(base_decoder=True, detail_mean=MEAN, detail_std=STD)
    inside = DAVAE(plain.config).eval()
    inside.load_state_dict(plain.state_dict())
    predictor = expecting(plain.latent)
    inside.set_predictor(predictor)
    return plain, inside, predictor


def picture(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(2, 3, height, width) * 2 - 1


def test_the_latent_is_another_and_the_picture_the_same(pair: tuple[DAVAE, DAVAE, DetailPredictor]) -> None:
    plain, inside, predictor = pair
    x = picture()
    z, residual = plain.encode(x), inside.encode(x)
    assert torch.equal(residual[:, :16], z[:, :16])
    expected = predictor.complete(z[:, :16])[:, 16:]
    assert expected.std() > 0.05
    assert torch.allclose(residual[:, 16:], z[:, 16:] - expected, atol=1e-5)
    assert torch.allclose(inside.decode(residual), plain.decode(z), atol=1e-4)


def test_no_detail_is_the_predicted_detail(pair: tuple[DAVAE, DAVAE, DetailPredictor]) -> None:
    plain, inside, predictor = pair
    base = torch.randn(2, 16, 4, 6)
    predicted = plain.decode(predictor.complete(base))
    assert torch.allclose(inside.decode(with_zero_detail(base, inside.latent)), predicted, atol=1e-4)
    z = torch.cat([base, torch.randn(2, 16, 4, 6)], dim=1)
    assert torch.allclose(inside.decode(z, detail_strength=0.0), predicted, atol=1e-4)
    assert not torch.allclose(inside.decode(z), predicted, atol=1e-2)


def test_strips_give_the_same(pair: tuple[DAVAE, DAVAE, DetailPredictor]) -> None:
    _, inside, _ = pair
    x = picture(128, 64)
    z = inside.encode(x)
    assert torch.allclose(inside.encode_tiled(x, rows=32), z, atol=1e-4)
    assert torch.allclose(inside.decode_tiled(z, rows=32), inside.decode(z), atol=1e-4)


def test_a_base_that_is_given_is_what_the_detail_is_expected_of(pair: tuple[DAVAE, DAVAE, DetailPredictor]) -> None:
    plain, inside, _ = pair
    x, base = picture(), torch.randn(2, 16, 4, 6)
    z = inside.encode(x, z_base=base)
    assert torch.equal(z[:, :16], base)
    assert torch.allclose(inside.decode(z), plain.decode(plain.encode(x, z_base=base)), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_off_what_it_adds(pair: tuple[DAVAE, DAVAE, DetailPredictor], dtype: torch.dtype) -> None:
    plain, inside, _ = pair
    plain, inside, x = plain.to(dtype), inside.to(dtype), picture().to(dtype)
    difference = inside.decode(inside.encode(x)) - plain.decode(plain.encode(x))
    assert difference.float().abs().max() < 0.1 * plain.decode(plain.encode(x)).float().abs().max()


def test_a_file_keeps_it(pair: tuple[DAVAE, DAVAE, DetailPredictor], tmp_path: Path) -> None:
    _, inside, _ = pair
    path = tmp_path / "inside.safetensors"
    checkpoints.save_autoencoder(path, inside)
    assert DAVAEConfig.from_state_dict(inside.state_dict()).predictor_width == 64
    read = checkpoints.load_autoencoder(path)
    assert read.config == inside.config
    x = picture()
    assert torch.equal(read.encode(x), inside.encode(x))


def test_a_damaged_one_is_named(pair: tuple[DAVAE, DAVAE, DetailPredictor], tmp_path: Path) -> None:
    _, inside, _ = pair
    state = inside.state_dict()
    for name, tensor, words in (
        ("predictor.conv_in.weight", None, "not a detail predictor: .*conv_in.weight"),
        ("predictor.blocks.1.conv1.weight", None, "lacks 1 tensor of its model, predictor.blocks.1.conv1.weight"),
        ("predictor.conv_in.weight", torch.zeros(64, 4, 3, 3), "predictor.conv_in.weight has shape"),
    ):
        damaged = {key: value for key, value in state.items() if key != name}
        damaged |= {name: tensor} if tensor is not None else {}
        broken = DAVAE(inside.config)
        broken.state_dict = lambda damaged=damaged: damaged  # type: ignore[method-assign, misc]
        checkpoints.save_autoencoder(tmp_path / "broken.safetensors", broken)
        with pytest.raises(CheckpointError, match=words):
            checkpoints.load_autoencoder(tmp_path / "broken.safetensors")


def test_a_second_one_and_one_of_another_shape_are_refused(
    pair: tuple[DAVAE, DAVAE, DetailPredictor], make_davae: Callable[..., DAVAE]
) -> None:
    _, inside, predictor = pair
    with pytest.raises(DAVAEError, match="has a predictor inside already"):
        inside.set_predictor(predictor)
    with pytest.raises(DAVAEError, match=r"for 16 \+ 16 channels, this DA-VAE has 16 \+ 32"):
        make_davae(detail=32).set_predictor(predictor)


@pytest.mark.parametrize("where", [torch.float16, "meta"])
def test_it_goes_where_the_davae_is(make_davae: Callable[..., DAVAE], where: torch.dtype | str) -> None:
    davae = make_davae().to(where)
    davae.set_predictor(expecting(davae.latent))
    assert {(t.device, t.dtype) for t in davae.parameters()} == {
        (davae.joint_up.conv.bias.device, davae.joint_up.conv.bias.dtype)
    }


def test_files_of_the_one_are_known_not_to_be_of_the_other(pair: tuple[DAVAE, DAVAE, DetailPredictor]) -> None:
    """The encoders are the same, the latents are not."""
    plain, inside, _ = pair
    states = {"plain": plain.state_dict(), "inside": inside.state_dict()}
    for own in states:
        history = History(of={"davae": identity("davae", states[own], own)})
        for other, state in states.items():
            assert bool(mismatch(history, "davae", state)) == (own != other), (own, other)
        half = {name: tensor.half() for name, tensor in states[own].items()}
        assert not mismatch(history, "davae", half)
    trained = {name: t + 0.2 if name.startswith("predictor.conv_out") else t for name, t in states["inside"].items()}
    assert mismatch(History(of={"davae": identity("davae", states["inside"], "it")}), "davae", trained)
    base = History(of={"base_vae": identity("base_vae", states["plain"], "it")})
    assert not mismatch(base, "base_vae", states["inside"])
