"""Reconstruction, spectrum and the base that survives."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from davae_core import command, images, tiny
from davae_core.davae import DAVAE
from davae_core.errors import DAVAEError
from davae_core.evaluation import reconstruction
from davae_core.evaluation.family import Family
from davae_core.evaluation.figures import Bound
from davae_core.evaluation.metrics import psnr, resize_bicubic
from davae_core.evaluation.reconstruction import METHODS, Generated
from davae_core.evaluation.references import References

Make = Callable[..., torch.Tensor]


def write(folder: Path, name: str, image: torch.Tensor, caption: str = "") -> Path:
    path = folder / name
    images.save_image(path, image)
    if caption:
        path.with_suffix(".txt").write_text(f"{caption}\n")
    return path


@pytest.fixture
def prepared(tmp_path: Path, references: References) -> Path:
    """A folder as the data script leaves it: two held-out images, three to train on, one of them of unknown name."""
    for number in range(2):
        write(tmp_path / "held_out" / "3d", f"{number}.png", torch.rand(3, 64, 64) * 2 - 1)
    captions = [references.captions[i] for i in references.training[:2]]
    for number, caption in enumerate([*captions, "3d unheard of"]):
        write(tmp_path / "train" / "3d", f"{number}.png", torch.rand(3, 64, 64) * 2 - 1, caption)
    return tmp_path


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
    read = list(reconstruction.read_batches(paths, 2, cpu))
    assert [len(x) for x in read] == [2, 1, 1]
    told = reconstruction.compare(family.davae, read, [])
    one_by_one = [images.read_image(path)[None] for path in paths]
    for name in METHODS:
        each = [psnr(reconstruction.reconstruct(family.davae, x)[name], x).item() for x in one_by_one]
        assert told[name]["psnr"] == pytest.approx(sum(each) / 4, abs=1e-3)


def test_a_davae_without_base_decoder_says_so(make_davae: Callable[..., DAVAE], picture: Make) -> None:
    with pytest.raises(DAVAEError, match="holds no base decoder"):
        reconstruction.reconstruct(make_davae(), picture(32))


# --- generated images -------------------------------------------------------------------------------------------------


def drawn(adapted: torch.Tensor, survived: torch.Tensor | None = None) -> Generated:
    half = resize_bicubic(adapted, 0.5)
    return Generated(adapted, half if survived is None else survived, half)


def test_the_training_images_themselves_have_a_ratio_of_one_and_enlarged_ones_little_left() -> None:
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    told = reconstruction.spectrum(drawn(x), x)
    assert told["adapted_ratio"] == pytest.approx(1.0)
    assert told["base_bicubic_ratio"] < 0.3
    assert reconstruction.spectrum(drawn(0.5 * x), x)["adapted_ratio"] == pytest.approx(0.25, rel=1e-3)


def test_flat_training_images_have_no_ratio_and_fail_the_bound() -> None:
    told = reconstruction.spectrum(drawn(torch.rand(2, 3, 64, 64)), torch.zeros(2, 3, 64, 64))
    assert math.isnan(told["adapted_ratio"])
    assert not Bound("", told["adapted_ratio"], at_least=0.5, at_most=2.0).passed


def test_training_images_of_another_size_are_refused() -> None:
    with pytest.raises(DAVAEError, match="training images are 32 x 32 px, the model draws 64 x 64"):
        reconstruction.spectrum(drawn(torch.zeros(1, 3, 64, 64)), torch.zeros(1, 3, 32, 32))


def test_the_base_survives_where_it_shows_the_davae_output_made_smaller(family: Family) -> None:
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    small = family.davae.shrink(x)
    noise = 0.02 * torch.randn(small.shape)
    told = reconstruction.survival(family.davae, drawn(x, small + noise))
    assert told["psnr"] == pytest.approx(40, abs=0.5) and told["lowest_psnr"] <= told["psnr"]
    assert reconstruction.survival(family.davae, drawn(x, small.flip(-1)))["psnr"] < 15


def test_the_base_channels_of_the_same_latents_are_what_is_decoded(family: Family, references: References) -> None:
    from davae_core.evaluation import generate
    from davae_core.evaluation.generate import Prompt
    from davae_core.sampling import Sampling

    prompts = [Prompt(i, references.captions[i]) for i in (0, 1, 2)]
    adapted, base = Sampling(2.0, 2.0, 1), Sampling(steps=1)
    made = reconstruction.draw(family, prompts, 0, adapted, base, batch=2)
    z = generate.adapted_latents(family, prompts, 0, adapted)
    assert torch.allclose(made.survived, family.davae.decode_base(z[:, :16]).clamp(-1, 1), atol=1e-4)
    assert torch.allclose(made.adapted, family.davae.decode(z).clamp(-1, 1), atol=1e-4)
    assert torch.allclose(made.base, generate.base_images(family, prompts, 0, base), atol=1e-4)


def test_captions_to_draw_are_spread_over_those_that_have_an_image(references: References) -> None:
    there = {references.captions[i]: Path() for i in references.training}
    prompts = reconstruction.choose(references, there, 100)
    assert len({prompt.index for prompt in prompts}) == 100
    assert {prompt.caption.split()[0] for prompt in prompts} == set(references.styles)
    held_out = references.captions[references.held_out_indices[0]]
    with pytest.raises(DAVAEError, match="no image in train/ has a caption"):
        reconstruction.choose(references, {held_out: Path()}, 3)


# --- bounds -----------------------------------------------------------------------------------------------------------


def passes(davae: Sequence[float], base: Sequence[float], ratios: Sequence[float], survived: float) -> list[bool]:
    told = {
        "reconstruction": {
            "davae": {"psnr": davae[0], "st-lpips-alex": davae[1]},
            "base_bicubic": {"psnr": base[0], "st-lpips-alex": base[1]},
        },
        "generation": {
            "high_frequency": {"adapted_ratio": ratios[0], "base_bicubic_ratio": ratios[1]},
            "base_survives": {"psnr": survived},
        },
    }
    return [bound.passed for bound in reconstruction.bounds_of(told)]


def test_the_bounds_are_those_that_were_set() -> None:
    assert passes((26.0, 0.1), (24.0, 0.2), (0.5, 0.3), 20.0) == [True] * 5
    assert passes((25.9, 0.2), (24.0, 0.2), (0.49, 0.31), 19.9) == [False] * 5
    assert passes((26.0, 0.1), (24.0, 0.2), (2.1, 0.3), 20.0) == [True, True, False, True, True]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_measures_everything_on_prepared_data(folder: Path, prepared: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "f.json", tmp_path / "sheet.jpg"
    options = ["--steps", "1", "--json", str(out), "--sheet", str(sheet)]
    reconstruction.main(["--images", str(prepared), "--folder", str(folder), *options])
    told = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told["images"] == 2 and told["generation"]["count"] == 2
    assert told["settings"]["captions"] == 100 and told["settings"]["seed"] == 0
    assert told["generation"]["sampling"]["base"] == {"shift": 3.0, "cfg": 1.5, "steps": 1}
    assert told["generation"]["sampling"]["adapted"] == {"shift": 2.0, "cfg": 2.0, "steps": 1}
    assert told["reconstruction"].keys() == METHODS.keys()
    lacking = sum("st-lpips" in line for line in told["not_measured"])
    assert len(told["reconstruction"]["davae"]) == 3 - lacking
    assert len(told["bounds"]) == 6 - lacking
    assert told["passed"] == all(bound["passed"] for bound in told["bounds"])
    assert len(told["weights"]) == 4 and told["versions"]["python"] and told["seconds"] > 0
    assert Image.open(sheet).size == (2 * 64, 4 * 64 + 3 * 64)


def test_any_folder_of_images_is_reconstructed_with_the_davae_file_alone(
    folder: Path, tmp_path: Path, picture: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = tmp_path / "shelf"
    write(shelf / "deep", "a.jpg", picture(40, 56)[0])
    write(shelf, "b.png", picture(24, 24)[0])
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / tiny.AUTOENCODER).write_bytes((folder / "vae" / tiny.AUTOENCODER).read_bytes())
    told = reconstruction.main(["--images", str(shelf), "--folder", str(alone)])
    assert told["images"] == 2 and told["generation"] is None
    assert list(told["weights"]) == [tiny.AUTOENCODER]
    assert f"Not measured: generated images: {shelf} has no captioned train/" in capsys.readouterr().out
    assert reconstruction.main(["--images", str(shelf), "--folder", str(alone), "--limit", "1"])["images"] == 1


def test_the_same_seed_gives_the_same_figures(folder: Path, prepared: Path) -> None:
    options = ["--images", str(prepared), "--folder", str(folder), "--steps", "1", "--limit", "1"]
    first, again, other = (reconstruction.main([*options, "--seed", seed])["generation"] for seed in "001")
    assert first == again and first != other


def test_empty_folders_and_missing_weights_end_the_command_with_a_message(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for options, message in (
        (["--images", str(tmp_path / "empty"), "--folder", str(folder)], "holds no images"),
        (["--images", str(tmp_path / "nowhere"), "--folder", str(folder)], "is not a folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.run(lambda options=options: reconstruction.main(options))
        assert re.search(f"error: .*{message}", capsys.readouterr().err)
    write(tmp_path, "a.png", torch.zeros(3, 32, 32))
    with pytest.raises(SystemExit, match="2"):
        command.run(lambda: reconstruction.main(["--images", str(tmp_path), "--folder", str(tmp_path / "empty")]))
    assert f"error: {tiny.AUTOENCODER} is not in" in capsys.readouterr().err
