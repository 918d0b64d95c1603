"""Predicted detail: four decodings of one base, drawings of the base model, painting over them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from davae_core import checkpoints, images
from davae_core.errors import DAVAEError
from davae_core.evaluation import generate, predicting
from davae_core.evaluation.family import Family
from davae_core.evaluation.generate import Prompt
from davae_core.metrics import psnr
from davae_core.predictor import DetailPredictor, PredictorConfig
from davae_core.sampling import Sampling
from harness.untrained import Family as Untrained

CAPTIONS = ("3d peach", "flat peach", "3d rocket", "flat rocket")
PROMPTS = [Prompt(1, "3d peach"), Prompt(4, "flat rocket")]
HOW = Sampling(shift=2.0, cfg=2.0, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(2)
    for i, caption in enumerate(CAPTIONS):
        place = root / ("train" if i < 3 else "held_out") / f"{i}.png"
        x = torch.ones(3, 64, 64)
        x[:, 16:48, 16:48] = torch.rand(3, 32, 32, generator=generator) * 2 - 1
        images.save_image(place, x)
        place.with_suffix(".txt").write_text(caption)
    return root


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory, untrained: Untrained) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "p.safetensors"
    checkpoints.save_predictor(path, untrained.predictor())
    return path


def test_the_command_writes_every_figure_and_its_sheets(
    folder: Path, predictor: Path, options: list[str], family: Family, tmp_path: Path
) -> None:
    out, sheet = tmp_path / "out.json", tmp_path / "sheet.png"
    words = ["--images", str(folder), "--predictor", str(predictor), *options, "--json", str(out)]
    words += ["--captions", "3", "--unknown", "1", "--denoise", "0.5", "1", "--steps", "1", "--sheet", str(sheet)]
    predicting.main(words)
    told = json.loads(out.read_text())
    assert told["held_out"].keys() == set(predicting.METHODS) and told["time_share"] > 0
    x = images.read_image(folder / "held_out" / "3.png")[None]
    z = checkpoints.load_predictor(predictor).complete(family.davae.encode_base(x))
    expected = psnr(family.davae.decode(z).clamp(-1, 1), x).item()
    assert told["held_out"]["predicted"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert len({round(some["psnr"], 3) for some in told["held_out"].values()}) == 4
    assert set(told["drawn"]) == {"base_bicubic", "davae_detail_0", "predicted", "adapted"}
    for some in told["drawn"].values():
        assert (some["training"]["count"], some["held_out"]["count"]) == (3, 1)
    assert {name: set(some) for name, some in told["denoise"].items()} == {
        "davae_detail_0": {"0.5", "1"},
        "predicted": {"0.5", "1"},
    }
    assert told["denoise"]["predicted"]["1"] == pytest.approx(told["denoise"]["davae_detail_0"]["1"], rel=1e-3)
    assert told["denoise"]["predicted"]["0.5"]["psnr"] != told["denoise"]["davae_detail_0"]["0.5"]["psnr"]
    assert [bound["at_least"] or bound["at_most"] for bound in told["bounds"]] == [1.8, 0.042, 0.05]
    assert images.read_image(tmp_path / "sheet-held_out.png").shape[1] == 5 * 64
    assert images.read_image(tmp_path / "sheet-drawn.png").shape[1] == 5 * 64


def test_drawings_are_decoded_again_at_twice_their_size(
    folder: Path,
    predictor: Path,
    options: list[str],
    family: Family,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    side = 2 * family.recommended.size
    for name in ("train/0", "train/1", "train/2", "held_out/3"):
        large = F.interpolate(images.read_image(folder / f"{name}.png")[None], size=(side, side), mode="nearest")[0]
        images.save_image(tmp_path / "large" / f"{name}.png", large)
        (tmp_path / "large" / f"{name}.txt").write_text((folder / f"{name}.txt").read_text())
    out, sheet = tmp_path / "out.json", tmp_path / "sheet.png"
    words = ["--images", str(tmp_path / "large"), "--predictor", str(predictor), *options, "--json", str(out)]
    predicting.main([*words, "--captions", "2", "--again", "--steps", "1", "--sheet", str(sheet)])
    told = json.loads(out.read_text())["again"]
    assert set(told) == {"enlarged", "davae_detail_0", "predicted"}
    assert len({round(some["psnr"], 4) for some in told.values()}) == 3
    assert "drawings at twice their size" in capsys.readouterr().out
    rows = images.read_image(tmp_path / "sheet-again.png").unflatten(1, (4, side))
    true, enlarged, none, predicted = rows[:, :, :, :side].unbind(1)
    assert torch.equal(true, images.read_image(tmp_path / "large" / "train" / "0.png"))
    drawing = generate.adapted_images(family, [Prompt(0, "3d peach")], 0, generate.adapted_sampling(family, 1))
    z = checkpoints.load_predictor(predictor).complete(family.davae.encode_small(drawing))
    assert (predicted - family.davae.decode(z)[0].clamp(-1, 1)).abs().max() < 0.01  # 8 bits
    assert (enlarged - predicted).abs().max() > 0.05 < (none - predicted).abs().max()


def test_pictures_too_small_to_compare_with_are_named(folder: Path, predictor: Path, options: list[str]) -> None:
    words = ["--images", str(folder), "--predictor", str(predictor), *options]
    with pytest.raises(DAVAEError, match=r"0\.png is 64 px, expected at least \d+, the size of --again"):
        predicting.main([*words, "--captions", "3", "--again", "--steps", "1"])
    with pytest.raises(DAVAEError, match="say how many as --captions"):
        predicting.main([*words, "--again"])


def test_painting_over_all_of_a_latent_is_drawing_anew_and_over_little_of_it_leaves_it(family: Family) -> None:
    side = family.recommended.size // family.latent.factor
    z = family.latent.denormalise(torch.randn(2, 32, side, side, generator=torch.Generator().manual_seed(1)))
    anew = generate.adapted_latents(family, PROMPTS, 3, HOW)
    assert torch.allclose(generate.painted_over(family, PROMPTS, z, 3, HOW, 1.0), anew, atol=1e-4)
    away = [
        (generate.painted_over(family, PROMPTS, z, 3, HOW, denoise) - z).square().mean().item()
        for denoise in (0.05, 0.5, 1.0)
    ]
    assert away[0] < away[1] < away[2] and away[0] < 0.1 * away[2]


def test_a_predictor_of_another_shape_and_a_denoise_out_of_range_are_refused(
    folder: Path, tmp_path: Path, options: list[str], untrained: Untrained
) -> None:
    other = replace(untrained.latent, detail_channels=32, detail_mean=(), detail_std=())
    path = tmp_path / "other.safetensors"
    checkpoints.save_predictor(path, DetailPredictor(PredictorConfig(other, width=32, blocks=1)))
    with pytest.raises(DAVAEError, match=r"other\.safetensors predicts the detail of .* 16 \+ 32 .* choose the"):
        predicting.main(["--images", str(folder), "--predictor", str(path), *options])
    inside = untrained.davae()
    inside.set_predictor(untrained.predictor())
    checkpoints.save_autoencoder(tmp_path / "inside.safetensors", inside)
    with pytest.raises(DAVAEError, match=r"inside\.safetensors has a predictor inside"):
        predicting.main(["--images", str(folder), *options, "--autoencoder", str(tmp_path / "inside.safetensors")])
    with pytest.raises(DAVAEError, match=r"--denoise is \[0.0\]; expected values above 0"):
        predicting.main(["--images", str(folder), "--denoise", "0"])
