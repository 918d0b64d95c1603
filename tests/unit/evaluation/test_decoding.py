"""A tiny decoder measured against the joint decoder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae_core import checkpoints, command, images
from davae_core.evaluation import decoding
from davae_core.evaluation.family import FamilyFiles
from davae_core.metrics import psnr
from davae_core.tiny_decoder import TinyDecoder, TinyDecoderConfig
from harness.untrained import Family

Make = Callable[..., torch.Tensor]


@pytest.fixture
def decoder(untrained: Family) -> TinyDecoder:
    torch.manual_seed(3)
    return TinyDecoder(TinyDecoderConfig(untrained.latent, (8,) * 5)).eval()


def write(folder: Path, name: str, x: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images.save_image(folder / name, x)


def test_the_two_pictures_are_compared_with_one_another_and_with_the_image(
    untrained: Family, decoder: TinyDecoder, picture: Make
) -> None:
    davae, x = untrained.davae(), torch.cat([picture(64), picture(64).flip(-1)])
    told = decoding.compare(davae, decoder, x.split(1), [])
    z = davae.encode(x)
    joint, small = davae.decode(z).clamp(-1, 1), decoder.decode(z).clamp(-1, 1)
    assert told["tiny_to_joint"]["psnr"] == pytest.approx(psnr(small, joint).mean().item(), abs=1e-3)
    assert told["tiny_to_image"]["psnr"] == pytest.approx(psnr(small, x).mean().item(), abs=1e-3)
    assert told["joint_to_image"]["psnr"] == pytest.approx(psnr(joint, x).mean().item(), abs=1e-3)
    assert decoding.compare(davae, decoder, [x], [])["tiny_to_joint"]["psnr"] == pytest.approx(
        told["tiny_to_joint"]["psnr"], abs=1e-3
    )


def test_any_size_is_compared_at_its_own(untrained: Family, decoder: TinyDecoder, picture: Make) -> None:
    joint, small = decoding.decode(untrained.davae(), decoder, picture(64)[:, :, :50, :37])
    assert joint.shape == small.shape == (1, 3, 50, 37)


def test_what_must_be_reached() -> None:
    def passes(part: float, distance: float) -> list[bool]:
        bounds = decoding.bounds_of(
            {"tiny_to_joint": {"psnr": 1.0, "st-lpips-alex": distance}}, {"128": {"part": part}}
        )
        return [bound.passed for bound in bounds]

    assert passes(0.1, 0.05) == [True, True] and passes(0.11, 0.051) == [False, False]


def test_the_command_measures_a_folder(
    where: FamilyFiles, decoder: TinyDecoder, tmp_path: Path, picture: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, sheet = tmp_path / "d.safetensors", tmp_path / "f.json", tmp_path / "s.png"
    checkpoints.save_tiny_decoder(file, decoder)
    write(tmp_path / "shelf", "a.png", picture(64)[0])
    options = ["--images", str(tmp_path / "shelf"), "--autoencoder", str(where.autoencoder), "--decoder", str(file)]
    options += ["--sides", "32", "--repeats", "2"]
    decoding.main([*options, "--json", str(out), "--sheet", str(sheet)])
    told = json.loads(out.read_text())
    assert told["images"] == 1 and told["decoding"].keys() == decoding.TITLES.keys()
    times = told["seconds_of_a_decode"]["32"]
    assert times["part"] == pytest.approx(times["tiny"] / times["joint"]) and times["tiny"] > 0
    assert list(told["weights"]) == ["autoencoder", "decoder"] and images.read_image(sheet).shape == (3, 3 * 64, 64)
    assert "tiny decoder to joint decoder" in capsys.readouterr().out


def test_a_decoder_of_another_davae_ends_the_command(
    where: FamilyFiles, tmp_path: Path, picture: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.safetensors"
    checkpoints.save_tiny_decoder(file, TinyDecoder(TinyDecoderConfig(Family(seed=77).latent, (8,) * 5)))
    write(tmp_path / "shelf", "a.png", picture(64)[0])
    options = ["--images", str(tmp_path / "shelf"), "--autoencoder", str(where.autoencoder), "--decoder", str(file)]
    for more, said in (
        ([], r"other\.safetensors was made for another DA-VAE.*: v\.safetensors"),
        (["--sides", "33"], ""),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.run(lambda more=more: decoding.main([*options, *more]))
        assert re.search(f"error: .*{said}", capsys.readouterr().err)
