"""The tiny decoder: the layout it has in common with TAESD, sizes, units, strips, files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints
from davae_core.checkpoints import files, inspect
from davae_core.checkpoints.detect import detect
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError, DAVAEError, LatentError
from davae_core.latent import LatentSpec
from davae_core.tiny_decoder import TinyDecoder, TinyDecoderConfig, decode_bytes, mismatch, reach, shape_of

UNITS = LatentSpec(detail_mean=(0.3,) * 16, detail_std=tuple(0.5 + 0.1 * i for i in range(16)))
WIDTHS = (12, 8, 8, 8, 4)


@pytest.fixture
def decoder() -> TinyDecoder:
    """One with units of its own."""
    torch.manual_seed(0)
    return TinyDecoder(TinyDecoderConfig(UNITS, WIDTHS)).eval()


def taesd(channels: int) -> dict[str, torch.Tensor]:
    """A decoder for ordinary latents, in the names of TAESD's files."""
    state = {"1.weight": torch.zeros(64, channels, 3, 3), "1.bias": torch.zeros(64)}
    for place in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        for layer in (0, 2, 4):
            state[f"{place}.conv.{layer}.weight"] = torch.zeros(64, 64, 3, 3)
            state[f"{place}.conv.{layer}.bias"] = torch.zeros(64)
    state |= {f"{place}.weight": torch.zeros(64, 64, 3, 3) for place in (7, 12, 17)}
    return state | {"19.weight": torch.zeros(3, 64, 3, 3), "19.bias": torch.zeros(3)}


def test_with_three_enlargements_it_has_the_names_and_shapes_of_taesd() -> None:
    spec = LatentSpec(2, 2, base_factor=4)
    state = TinyDecoder(TinyDecoderConfig(spec, (64,) * 4)).state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in taesd(4).items()}
    assert shape_of(taesd(16)) == (16, (64,) * 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (20, 12)])
def test_any_size_fits(decoder: TinyDecoder, size: tuple[int, int]) -> None:
    assert decoder(torch.randn(2, 32, *size)).shape == (2, 3, 16 * size[0], 16 * size[1])


def test_decode_takes_the_autoencoders_units_and_forward_the_models(decoder: TinyDecoder) -> None:
    z = torch.randn(1, 32, 4, 4)
    assert torch.allclose(decoder.decode(z), decoder(UNITS.normalise(z)), atol=1e-6)
    assert not torch.allclose(decoder.decode(z), decoder(z), atol=1e-3)
    weak = torch.cat([z[:, :16], 0.25 * z[:, 16:]], dim=1)
    assert torch.equal(decoder.decode(z, 0.25), decoder.decode(weak))
    assert not torch.allclose(decoder.decode(weak), decoder.decode(z), atol=1e-3)


def test_the_layers_give_0_to_1_and_the_picture_is_minus_1_to_1(decoder: TinyDecoder) -> None:
    for name, value in (("weight", 0.0), ("bias", 0.75)):
        torch.nn.init.constant_(decoder[-1].get_parameter(name), value)
    assert torch.allclose(decoder(torch.randn(1, 32, 2, 2)), torch.tensor(0.5))


@pytest.mark.parametrize("rows", [16, 40, 160, 4000])
def test_strips_are_the_same_picture(decoder: TinyDecoder, rows: int) -> None:
    z, seen = torch.randn(1, 32, 50, 2), []
    whole = decoder.decode(z, 0.5)
    strips = decoder.decode_tiled(z, 0.5, rows, on_strip=lambda: seen.append(1))
    assert torch.allclose(strips, whole, atol=1e-5)
    assert len(seen) == -(-50 // max(1, rows // 16))


def test_a_pixel_depends_on_no_latent_pixel_out_of_reach(decoder: TinyDecoder) -> None:
    """What strips rely on: with fewer rows around them, their edges would show."""
    far = reach(4)
    for parameter in decoder.double().parameters():  # nothing is cut off by an activation
        parameter.abs_().add_(0.01)
    z = torch.zeros(1, 32, 2 * far + 3, 1, dtype=torch.float64)
    before = decoder(z)
    z[:, :, far + 1] = 1
    changed = (decoder(z) - before)[0].abs().sum((0, 2)).nonzero().flatten() // 16 - (far + 1)
    assert -far <= changed.min() <= 1 - far and far - 1 <= changed.max() <= far


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 4, 8, 8), (32, 8, 8), (0, 32, 8, 8), (1, 32, 0, 8)])
def test_what_is_no_davae_latent_is_named(decoder: TinyDecoder, shape: tuple[int, ...]) -> None:
    for decode in (decoder, decoder.decode, decoder.decode_tiled):
        with pytest.raises(LatentError, match="latent has shape"):
            decode(torch.zeros(shape))


def test_it_is_known_which_davae_a_decoder_is_of() -> None:
    assert mismatch(UNITS, UNITS) == mismatch(UNITS, replace(UNITS, preview=(0.5,) * 51)) == ""
    assert mismatch(UNITS, replace(UNITS, detail_mean=tuple(m + 1e-6 for m in UNITS.detail_mean))) == ""
    for other in (LatentSpec(), replace(UNITS, detail_mean=(0.4,) * 16), replace(UNITS, base_scale=0.3611)):
        assert "another DA-VAE" in mismatch(UNITS, other) and "another DA-VAE" in mismatch(other, UNITS)
    assert "16 + 16 channels at 1/16, but these have 16 + 32 at 1/16" in mismatch(UNITS, LatentSpec(detail_channels=32))
    assert "16 + 16 at 1/32" in mismatch(UNITS, replace(UNITS, scale=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(64,) * 5, (48, 32, 24, 16, 16)])
@pytest.mark.parametrize(("height", "rows"), [(512, None), (2048, None), (2048, 64), (4096, 512)])
def test_the_memory_that_is_asked_for_is_what_is_counted_or_a_quarter_more(
    peak: Callable[[Callable[[], object]], int],
    dtype: torch.dtype,
    widths: tuple[int, ...],
    height: int,
    rows: int | None,
) -> None:
    with torch.device("meta"):
        model = TinyDecoder(TinyDecoderConfig(UNITS, widths)).to(dtype)
        z = torch.empty(1, 32, height // 16, 32, dtype=dtype)
    counted = peak(lambda: model.decode(z) if rows is None else model.decode_tiled(z, rows=rows))
    assert 1 <= decode_bytes(model.config, height, 512, dtype.itemsize, rows) / counted <= 1.25


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (8,), (8, 8, 8, 8, 0)])
def test_widths_that_do_not_fit_the_latent_are_named(widths: tuple[int, ...]) -> None:
    with pytest.raises(DAVAEError, match=r"latents at 1/16 has 5 widths.*got"):
        TinyDecoderConfig(UNITS, widths)


def test_it_works_in_half_precision(decoder: TinyDecoder) -> None:
    z = torch.randn(1, 32, 4, 4)
    expected = decoder.decode(z)
    assert torch.allclose(decoder.to(torch.bfloat16).decode(z.bfloat16()).float(), expected, atol=0.1)


def test_a_file_gives_it_back(decoder: TinyDecoder, tmp_path: Path) -> None:
    path = tmp_path / "decoder.safetensors"
    checkpoints.save_tiny_decoder(path, decoder)
    again = checkpoints.load_tiny_decoder(path)
    assert again.config == decoder.config and again.config.widths == WIDTHS
    z = torch.randn(1, 32, 4, 4)
    assert torch.equal(again.decode(z), decoder.decode(z))
    assert checkpoints.load_tiny_decoder(path, torch.float16)[1].weight.dtype == torch.float16


def test_inspect_tells_its_shape(decoder: TinyDecoder, tmp_path: Path) -> None:
    path = tmp_path / "decoder.safetensors"
    checkpoints.save_tiny_decoder(path, decoder)
    told = inspect.describe(path)
    assert told["kind"] == "tiny_decoder" and told["config"]["widths"] == WIDTHS
    assert told["config"]["latent"]["detail_mean"] == UNITS.detail_mean
    assert "widths: [12, 8, 8, 8, 4]" in inspect.text(told)


def test_a_decoder_of_ordinary_latents_is_told_apart(tmp_path: Path) -> None:
    assert detect(taesd(16)).description == "a TAESD decoder of ordinary latents with 16 channels (no detail)"
    path = tmp_path / "taesd3_decoder.safetensors"
    files.save(path, taesd(16), {})
    with pytest.raises(
        CheckpointError,
        match=r"taesd3_decoder\.safetensors is a TAESD decoder of ordinary latents.*choose a tiny decoder of DA-VAE "
        r"latents \(models/vae_approx\)",
    ):
        checkpoints.load_tiny_decoder(path)


def test_a_file_that_lost_its_metadata_is_told(decoder: TinyDecoder, tmp_path: Path) -> None:
    files.save(tmp_path / "bare.safetensors", decoder.state_dict(), {})
    with pytest.raises(CheckpointError, match=r"bare\.safetensors has no DA-VAE metadata"):
        checkpoints.load_tiny_decoder(tmp_path / "bare.safetensors")


def test_other_files_are_named(decoder: TinyDecoder, make_davae: Callable[..., DAVAE], tmp_path: Path) -> None:
    davae, path = tmp_path / "davae.safetensors", tmp_path / "decoder.safetensors"
    checkpoints.save_autoencoder(davae, make_davae())
    checkpoints.save_tiny_decoder(path, decoder)
    with pytest.raises(CheckpointError, match=r"davae\.safetensors is a DA-VAE autoencoder; choose a tiny decoder"):
        checkpoints.load_tiny_decoder(davae)
    with pytest.raises(
        CheckpointError, match=r"decoder\.safetensors is a tiny decoder of DA-VAE latents; choose a DA-VAE autoencoder"
    ):
        checkpoints.load_autoencoder(path)


def test_a_damaged_file_is_named(decoder: TinyDecoder, tmp_path: Path) -> None:
    path = tmp_path / "decoder.safetensors"
    checkpoints.save_tiny_decoder(path, decoder)
    state, info = files.read(path)
    for name, change, said in (
        ("1.weight", lambda t: t[:, :16], r"latents of 16 channels at 1/16, its metadata says 32 at 1/16"),
        ("9.conv.2.weight", lambda t: t[:, :4], r"9\.conv\.2\.weight"),
        ("23.conv.0.weight", lambda t: t * float("nan"), "NaN"),
    ):
        files.save(path, {**state, name: change(state[name]).contiguous()}, info)
        with pytest.raises(CheckpointError, match=rf"decoder\.safetensors.*{said}"):
            checkpoints.load_tiny_decoder(path)
    files.save(path, {name: tensor for name, tensor in state.items() if name != "22.weight"}, info)
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors.*at 1/8, its metadata says 32 at 1/16"):
        checkpoints.load_tiny_decoder(path)
