"""Drawings against their own pictures: what is counted, over seeds, the bounds, the report."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from davae_core import flow, images, perceptual
from davae_core.errors import DAVAEError
from davae_core.evaluation import drawing, drawn, generate, page
from davae_core.evaluation.drawn import Asked, Samplings, Shown
from davae_core.evaluation.family import Family
from davae_core.evaluation.generate import Prompt
from davae_core.evaluation.pictures import Picture, Pictures, references_of
from davae_core.evaluation.references import References
from davae_core.held_out import TIMES
from davae_core.metrics import psnr
from davae_core.sampling import Sampling, initial_noise

CAPTIONS = ("3d peach", "flat peach", "3d rocket", "flat rocket")
HOW = Samplings(Sampling(2.0, 2.0, 1), Sampling(steps=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training pictures and a held-out one, whose name and style the others have."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(2)
    for i, caption in enumerate(CAPTIONS):
        x = torch.ones(3, 64, 64)
        x[:, 16:48, 16:48] = torch.rand(3, 32, 32, generator=generator) * 2 - 1
        place = root / ("train" if i < 3 else "held_out") / f"{i}.png"
        images.save_image(place, x)
        place.with_suffix(".txt").write_text(caption)
    return root


@pytest.fixture(scope="module")
def asked(folder: Path) -> list[Asked]:
    pictures = [Picture(folder / "train" / f"{i}.png", CAPTIONS[i]) for i in range(3)]
    return [Asked(Prompt(i, picture.caption), picture) for i, picture in enumerate(pictures)]


@pytest.fixture(scope="module")
def references(asked: list[Asked]) -> References:
    return references_of(Pictures([one.picture for one in asked], []), side=8)


def test_the_figures_are_those_of_the_drawings_and_do_not_depend_on_the_batch(
    family: Family, asked: list[Asked], references: References
) -> None:
    rows = [Shown("flat peach")]
    told, lists = drawn.known(family, asked, 3, HOW, [], references, 2, rows)
    prompts = [one.prompt for one in asked]
    x = torch.stack([images.read_image(one.picture.path) for one in asked])
    z, true = generate.adapted_latents(family, prompts, 3, HOW.adapted), family.davae.encode(x)
    y = family.davae.decode(z).clamp(-1, 1)
    assert lists["psnr"] == pytest.approx(psnr(y, x).tolist(), rel=1e-3)
    error = (family.latent.normalise(z) - family.latent.normalise(true)).square()
    assert told["base_error"] == pytest.approx(error[:, :16].mean().item(), rel=1e-3)
    assert told["detail_error"] == pytest.approx(error[:, 16:].mean().item(), rel=1e-3)
    native = generate.base_images(family, prompts, 3, HOW.base)
    assert told["native_psnr"] == pytest.approx(psnr(native, family.davae.shrink(x)).mean().item(), rel=1e-3)
    survived = family.davae.decode_base(z[:, :16]).clamp(-1, 1)
    assert told["base_survives"] == pytest.approx(psnr(survived, family.davae.shrink(y)).mean().item(), rel=1e-3)
    assert {kind: image.shape[-1] for kind, image in rows[0].images.items()} == {
        "true": 64,
        "reconstruction": 64,
        "drawn": 64,
        "base model": 32,
    }
    assert torch.equal(rows[0].images["true"], x[1]) and rows[0].figures["psnr"] == lists["psnr"][1]
    again, _ = drawn.known(family, asked, 3, HOW, [], references, 3)
    assert again == pytest.approx(told, rel=1e-3)
    other, _ = drawn.known(family, asked, 4, HOW, [], references, 3)
    assert other["base_error"] != pytest.approx(told["base_error"], rel=1e-3)


def test_a_true_picture_is_nothing_away_from_itself_and_its_mottle_is_its_own(asked: list[Asked]) -> None:
    x = torch.stack([images.read_image(one.picture.path) for one in asked])
    distance = perceptual.load_perceptual("st-lpips-alex")
    told = drawn.means(drawn.against(x, x, [distance]))
    assert told["st-lpips-alex"] == 0 and told["mottle"] < 1e-3 and told["off_white"] == 0
    speckled = x - 0.2 * (torch.rand(3, 1, 64, 64) < 0.1)
    worse = drawn.means(drawn.against(speckled, x, [distance]))
    assert worse["st-lpips-alex"] > 0.001 and worse["mottle"] > 2 and worse["off_white"] == pytest.approx(0.1, abs=0.02)


def test_pictures_without_a_figure_do_not_spoil_the_mean() -> None:
    assert drawn.means({"a": [1.0, float("nan"), 3.0]}) == {"a": 2.0}


def test_the_loss_of_the_base_model_is_that_of_its_own_channels(family: Family, asked: list[Asked]) -> None:
    told = drawn.losses(family, [one.picture for one in asked], 2)
    assert told["adapted"].keys() - told["base_model"].keys() == {
        name for name in told["adapted"] if name.startswith("detail")
    }
    assert told["adapted"]["images"] == 3 and told["adapted"]["base"] != told["base_model"]["base"]


def test_what_one_step_predicts_at_each_noise_level(family: Family, asked: list[Asked]) -> None:
    """From noise alone it is the noise less the velocity."""
    told = drawn.denoised(family, [one.picture for one in asked], 2)
    assert set(told["base_model"]) == {f"base/t{time:g}" for time in (*TIMES, 1.0)}
    spec = family.latent
    x = torch.stack([images.read_image(one.picture.path) for one in asked])
    z = spec.normalise(family.davae.encode(x))
    noise = initial_noise(0, range(len(z)), z.shape[1:])
    for t in (0.5, 1.0):
        noised = flow.add_noise(z, noise, torch.full((len(z),), t))
        v = family.adapted(noised, torch.full((len(z),), t), *family.encode([one.prompt.caption for one in asked]))
        error = (noised - t * v - z).square()[:, spec.base_channels :].mean()
        assert told["adapted"][f"detail/t{t:g}"] == pytest.approx(float(error), rel=1e-3)


def test_captions_are_known_or_unknown_and_have_their_place_among_the_references(folder: Path) -> None:
    train = [Picture(folder / "train" / f"{i}.png", CAPTIONS[i]) for i in range(3)]
    out = [Picture(folder / "held_out" / "3.png", CAPTIONS[3]), train[1]]
    references = references_of(Pictures(train, out), side=8)
    assert [one.prompt for one in drawing.asked_of(train, 9, references)] == [
        Prompt(i, caption) for i, caption in enumerate(CAPTIONS[:3])
    ]
    assert [one.prompt for one in drawing.asked_of(out, 9, references, held_out=True)] == [Prompt(3, CAPTIONS[3])]
    thinned = references_of(Pictures(train, out), side=8, most=1)
    assert [one.prompt.caption for one in drawing.asked_of(train, 9, thinned)] == [CAPTIONS[0]]


def test_figures_over_seeds_have_a_mean_and_a_spread() -> None:
    told = drawing.over_seeds({0: {"psnr": 20.0}, 1: {"psnr": 22.0}})
    assert told == {"psnr": {"mean": 21.0, "spread": pytest.approx(2**0.5)}}
    assert page.number(drawing.over_seeds({0: {"psnr": 20.0}})["psnr"]["spread"]) == "-"


def bounds(known: dict[str, float], name: float, gain: float) -> dict[str, bool]:
    figures = {key: {"mean": value} for key, value in known.items()}
    measured = {
        "known": {"figures": figures},
        "unknown": {"composes": True, "figures": {"name": {"mean": name}}},
        "held_out": {"reconstruction": {"davae": {"psnr": 25 + gain}, "base_bicubic": {"psnr": 25.0}}},
    }
    return {bound.name: bound.passed for bound in drawing.bounds_of(measured)}


def test_the_bounds_are_those_that_were_set() -> None:
    good = {"mottle_ratio": 1.1, "st-lpips-alex": 0.05, "psnr": 24.5, "off_white": 0.003, "top1": 0.98}
    bad = {"mottle_ratio": 1.11, "st-lpips-alex": 0.051, "psnr": 24.4, "off_white": 0.0031, "top1": 0.97}
    kept = bounds(good | {"base_survives": 20}, 0.9, 2.5)
    assert len(kept) == 8 and all(kept.values())
    assert not any(bounds(bad | {"base_survives": 19.9}, 0.89, 2.4).values())


def test_names_are_counted_only_where_captions_are_put_together_of_known_ones(asked: list[Asked]) -> None:
    x = torch.zeros(3, 3, 8, 8)
    out = torch.tensor([False, False, True])
    assert drawing.composes(References(x, ("3d peach", "flat rocket", "3d rocket"), out))
    assert not drawing.composes(References(x, ("a photo of x", "b", "a photo of y"), out))
    assert not drawing.composes(References(x, ("a b", "c d", "a d"), torch.zeros(3, dtype=torch.bool)))


def test_the_command_writes_figures_and_a_page_that_holds_everything(
    folder: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, html = tmp_path / "f.json", tmp_path / "f.html"
    more = ["--images", str(folder), "--steps", "1", "--seeds", "0", "5", "--batch", "2"]
    drawing.main([*options, *more, "--json", str(out), "--html", str(html)])
    told = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told["known"]["count"] == 3 and told["known"]["seeds"].keys() == {"0", "5"}
    assert told["unknown"]["count"] == 1 and told["held_out"]["count"] == 1
    values = [run["psnr"] for run in told["known"]["seeds"].values()]
    assert told["known"]["figures"]["psnr"]["mean"] == pytest.approx(sum(values) / 2)
    assert told["known"]["floor"]["psnr"] > 0 and told["weights"].keys() >= {"model", "adapter"}
    said = capsys.readouterr().out
    assert re.search(r"known captions: PSNR, dB +\d.* FAIL", said), "random weights do not draw"
    assert "predicted in one step, 3 known captions" in said and told["known"]["denoised"]["adapted"]["detail/t1"] > 0
    text = html.read_text()
    assert 'class="FAIL"' in text and not re.search(r"(src|href)=.(?!data:)", text)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 3 * 4 + 1 * 2
    assert Image.open(io.BytesIO(base64.b64decode(pictures[3]))).size == (32, 32)


def test_training_pictures_alone_are_measured_and_the_rest_is_named(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = drawing.main([*options, "--images", str(folder / "train"), "--steps", "1", "--captions", "1"])
    assert told["unknown"] is None and told["held_out"] is None and told["known"]["count"] == 1
    assert "Not measured: loss and reconstruction on held-out pictures" in capsys.readouterr().out
    with pytest.raises(DAVAEError, match="is not a folder"):
        drawing.main([*options, "--images", str(folder / "gone")])


def test_captions_are_text_and_large_pictures_are_jpeg() -> None:
    assert "&lt;b&gt;" in page._figure(Shown("<b>", {"true": torch.zeros(3, 8, 8)}))
    assert page.data_uri(torch.zeros(3, 8, 300)).startswith("data:image/jpeg;base64,")
