"""Reconstruction: the three ways, their figures, the command."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from davae_core import command, images
from davae_core.davae import DAVAE
from davae_core.errors import DAVAEError
from davae_core.evaluation import reconstruction
from davae_core.evaluation.family import Family, FamilyFiles
from davae_core.evaluation.pictures import Picture, read_batches
from davae_core.evaluation.reconstruction import METHODS
from davae_core.metrics import psnr, resize_bicubic

Make = Callable[..., torch.Tensor]


def write(folder: Path, name: str, image: torch.Tensor) -> Path:
    path = folder / name
    images.save_image(path, image)
    return path


# --- reconstruction ---------------------------------------------------------------------------------------------------


def test_the_three_ways_are_what_they_are_called(family: Family, picture: Make) -> None:
    davae, x = family.davae, picture(64)
    made = reconstruction.reconstruct(davae, x)
    assert made.keys() == METHODS.keys()
    z = davae.encode(x)
    assert torch.equal(made["davae"], davae.decode(z).clamp(-1, 1))
    without = torch.cat([z[:, :16], torch.zeros_like(z[:, 16:])], dim=1)
    assert torch.allclose(made["davae_detail_0"], davae.decode(without).clamp(-1, 1), atol=1e-5)
    half = davae.decode_base(davae.encode_base(x)).clamp(-1, 1)
    assert half.shape == (1, 3, 32, 32)
    assert torch.equal(made["base_bicubic"], resize_bicubic(half, 2))


@pytest.mark.parametrize(("height", "width"), [(50, 33), (16, 17), (5, 64)])
def test_an_image_that_does_not_fit_is_continued_and_cut_back(
    family: Family, picture: Make, height: int, width: int
) -> None:
    x = picture(height, width)
    top, left = (-height % 16) // 2, (-width % 16) // 2
    padded = F.pad(x, (left, -width % 16 - left, top, -height % 16 - top), mode="replicate")
    whole = reconstruction.reconstruct(family.davae, padded)
    for name, y in reconstruction.reconstruct(family.davae, x).items():
        assert y.shape == x.shape
        assert torch.allclose(y, whole[name][..., top : top + height, left : left + width], atol=1e-5)


def test_figures_are_means_over_images_and_not_over_batches(family: Family, tmp_path: Path, picture: Make) -> None:
    paths = [write(tmp_path, f"{i}.png", picture(*size)[0]) for i, size in enumerate([(32, 32)] * 3 + [(40, 24)])]
    cpu = torch.device("cpu")
    read = list(read_batches([Picture(path, "") for path in paths], 2, cpu))
    assert [len(x) for x in read] == [2, 1, 1]
    told = reconstruction.compare(family.davae, read, [])
    one_by_one = [images.read_image(path)[None] for path in paths]
    for name in METHODS:
        each = [psnr(reconstruction.reconstruct(family.davae, x)[name], x).item() for x in one_by_one]
        assert told[name]["psnr"] == pytest.approx(sum(each) / 4, abs=1e-3)


def test_a_davae_without_base_decoder_says_so(make_davae: Callable[..., DAVAE], picture: Make) -> None:
    with pytest.raises(DAVAEError, match="holds no base decoder"):
        reconstruction.reconstruct(make_davae(), picture(32))


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_the_bounds_are_those_that_were_set() -> None:
    def passes(gain: float, distance: float) -> list[bool]:
        davae, base = {"psnr": 25 + gain, "st-lpips-alex": distance}, {"psnr": 25.0, "st-lpips-alex": 0.2}
        return [bound.passed for bound in reconstruction.bounds_of({"davae": davae, "base_bicubic": base})]

    assert passes(2.5, 0.035) == [True, True] and passes(2.4, 0.036) == [False, False]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_measures_any_folder_with_the_davae_file_alone(
    where: FamilyFiles, tmp_path: Path, picture: Make
) -> None:
    shelf, out, sheet = tmp_path / "shelf", tmp_path / "f.json", tmp_path / "sheet.jpg"
    write(shelf / "deep", "a.jpg", picture(64)[0])
    write(shelf, "b.png", picture(64)[0])
    options = ["--images", str(shelf), "--autoencoder", str(where.autoencoder), "--json", str(out)]
    reconstruction.main([*options, "--sheet", str(sheet)])
    told = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told["images"] == 2 and told["reconstruction"].keys() == METHODS.keys()
    lacking = sum("st-lpips" in line for line in told["not_measured"])
    assert len(told["reconstruction"]["davae"]) == 3 - lacking
    assert told["passed"] == all(bound["passed"] for bound in told["bounds"])
    assert list(told["weights"]) == ["autoencoder"] and told["versions"]["python"] and told["seconds"] > 0
    assert Image.open(sheet).size == (2 * 64, 4 * 64)
    write(shelf / "held_out", "c.png", picture(32)[0])
    assert reconstruction.main(options)["images"] == 1
    (shelf / "held_out" / "c.png").unlink()
    (shelf / "held_out").rmdir()
    assert reconstruction.main([*options, "--limit", "1"])["images"] == 1


def test_empty_folders_and_missing_weights_end_the_command_with_a_message(
    where: FamilyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "one", "a.png", torch.zeros(3, 32, 32))
    for folder, file, message in (
        ("empty", where.autoencoder, "holds no images"),
        ("nowhere", where.autoencoder, "is not a folder"),
        ("one", tmp_path / "gone.safetensors", r"gone\.safetensors"),
    ):
        options = ["--images", str(tmp_path / folder), "--autoencoder", str(file)]
        with pytest.raises(SystemExit, match="2"):
            command.run(lambda options=options: reconstruction.main(options))
        assert re.search(f"error: .*{message}", capsys.readouterr().err)
