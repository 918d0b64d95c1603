"""Recall: which reference is nearest, what is counted, and what is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from davae_core import command, images
from davae_core.errors import DAVAEError
from davae_core.evaluation import figures, recall
from davae_core.evaluation.figures import Bound
from davae_core.evaluation.recall import Verdict
from davae_core.evaluation.references import References

CAPTIONS = ("3d peach", "3d red heart", "flat peach", "flat red heart", "noto peach", "noto red heart")


@pytest.mark.parametrize("side", [32, 64, 128])
def test_an_image_that_is_a_reference_is_its_own_nearest(references: References, side: int) -> None:
    some = list(range(0, 1200, 40))
    x = F.interpolate(references.images[some], size=(side, side), mode="nearest")
    verdicts = recall.judge(x, [references.captions[i] for i in some], references)
    assert all(verdict.top1 and verdict.top5 and verdict.name and verdict.style for verdict in verdicts)


def test_a_mirrored_image_is_its_own_nearest(references: References) -> None:
    some = list(range(0, 1200, 40))
    verdicts = recall.judge(references.images[some].flip(-1), [references.captions[i] for i in some], references)
    assert all(verdict.top1 for verdict in verdicts)


def test_an_image_with_noise_is_still_recognised_and_one_upside_down_is_not(references: References) -> None:
    some = list(range(0, 1200, 40))
    captions, x = [references.captions[i] for i in some], references.images[some]
    noisy = x + 0.2 * torch.randn(x.shape)
    assert recall.shares(recall.judge(noisy, captions, references))["top1"] > 0.9
    assert recall.shares(recall.judge(x.flip(-2), captions, references))["top1"] < 0.5


def test_the_five_nearest_are_in_order(few: Callable[..., References]) -> None:
    references = few(CAPTIONS)
    x = 0.7 * references.images[2:3] + 0.3 * references.images[5:6]
    (verdict,) = recall.judge(x, ["noto red heart"], references)
    assert verdict.nearest[:2] == ("flat peach", "noto red heart") and len(set(verdict.nearest)) == 5
    assert verdict.top5 and not verdict.top1


def test_fewer_than_five_references_are_enough(few: Callable[..., References]) -> None:
    references = few(CAPTIONS[:2])
    assert len(recall.judge(references.images, CAPTIONS[:2], references)[0].nearest) == 2


def test_name_and_style_are_counted_apart() -> None:
    told = [
        Verdict("3d red heart", ("3d red heart", "flat peach")),
        Verdict("3d red heart", ("flat red heart", "3d red heart")),
        Verdict("3d red heart", ("3d peach", "flat peach")),
        Verdict("3d red heart", ("flat peach", "noto peach")),
    ]
    assert [verdict.name for verdict in told] == [True, True, False, False]
    assert [verdict.style for verdict in told] == [True, False, True, False]
    assert recall.shares(told) == {"count": 4, "top1": 0.25, "top5": 0.5, "name": 0.5, "style": 0.5}


def test_training_and_held_out_are_counted_apart_and_held_out_by_style(few: Callable[..., References]) -> None:
    references = few(CAPTIONS, held_out=("3d peach", "flat peach"))
    right, wrong = (caption for caption in ("3d peach", "flat peach"))
    told = recall.summary(
        [
            Verdict(right, (right,)),
            Verdict(wrong, ("noto peach",)),
            Verdict("noto peach", ("noto peach",)),
        ],
        references,
    )
    assert told["training"] == {"count": 1, "top1": 1.0, "top5": 1.0, "name": 1.0, "style": 1.0}
    assert told["held_out"]["count"] == 2 and told["held_out"]["top1"] == 0.5 and told["held_out"]["name"] == 1.0
    assert told["held_out"]["by_style"].keys() == {"3d", "flat"}
    assert told["held_out"]["by_style"]["flat"]["style"] == 0.0
    assert told["mistakes"] == {"flat peach": ["noto peach"]}


def test_every_fifth_training_caption_and_all_held_out_pairs_are_drawn(references: References) -> None:
    prompts = recall.choose(references, 5, None, None)
    held_out = [prompt for prompt in prompts if references.held_out[prompt.index]]
    assert len(held_out) == 100 and len(prompts) == 320
    assert all(references.captions[prompt.index] == prompt.caption for prompt in prompts)
    assert prompts[1].index == references.training[5]


def test_a_quick_run_takes_captions_of_every_style(references: References) -> None:
    captions = [prompt.caption for prompt in recall.choose(references, 5, 8, 4)]
    assert len(set(captions)) == 12
    assert {caption.split()[0] for caption in captions[:8]} == set(references.styles)
    assert {caption.split()[0] for caption in captions[8:]} == set(references.styles)


def test_no_captions_at_all_are_refused(references: References) -> None:
    with pytest.raises(DAVAEError, match="no captions to draw"):
        recall.choose(references, 5, 0, 0)


def test_bounds_are_kept_at_the_limit_and_broken_below_it() -> None:
    assert Bound("", 0.92, at_least=0.92).passed and not Bound("", 0.9199, at_least=0.92).passed
    assert Bound("", 2.0, at_least=0.5, at_most=2.0).passed and not Bound("", 2.01, at_least=0.5, at_most=2.0).passed
    assert Bound("", -1e-9, below=0.0).passed and not Bound("", 0.0, below=0.0).passed
    assert not Bound("", float("nan"), at_least=0.0).passed
    assert figures.bound_from_json(Bound("a", 1.0, at_most=2.0).to_json()) == Bound("a", 1.0, at_most=2.0)


def test_each_model_has_the_four_bounds_of_the_parts_that_were_drawn(few: Callable[..., References]) -> None:
    references = few(CAPTIONS, held_out=CAPTIONS[:1])
    own = {caption: Verdict(caption, (caption,)) for caption in CAPTIONS}
    both = recall.bounds_of("adapted", recall.summary(list(own.values()), references))
    assert [(bound.at_least, bound.passed) for bound in both] == [(0.92, True), (0.97, True), (0.9, True), (0.75, True)]
    only = recall.bounds_of("base", recall.summary([own["noto peach"]], references))
    assert [bound.name for bound in only] == ["base, training: top-1", "base, training: top-5"]


def test_the_command_writes_figures_settings_and_versions(options: list[str], tmp_path: Path) -> None:
    out, sheet = tmp_path / "recall.json", tmp_path / "sheet.jpg"
    more = ["--captions", "3", "--held-out", "2", "--steps", "1", "--batch", "2", "--seed", "4"]
    recall.main([*options, "--json", str(out), "--sheet", str(sheet), *more])
    told = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told["command"] == "recall"
    assert told["settings"] == {
        "every": 5,
        "captions": 3,
        "held_out": 2,
        "seed": 4,
        "batch": 2,
        "device": "cpu",
    }
    assert told["models"].keys() == {"adapted", "base"}
    for name, size, shift in (("adapted", 64, 2.0), ("base", 32, 3.0)):
        model = told["models"][name]
        assert (model["size"], model["shift"], model["steps"]) == (size, shift, 1)
        assert model["training"].keys() == {"count", "top1", "top5", "name", "style"}
        assert (model["training"]["count"], model["held_out"]["count"]) == (3, 2)
        assert all(0 <= model[part][key] <= 1 for part in ("training", "held_out") for key in recall.WORDS)
        assert sum(style["count"] for style in model["held_out"]["by_style"].values()) == 2
    assert len(told["bounds"]) == 8 and told["passed"] == all(bound["passed"] for bound in told["bounds"])
    assert told["versions"]["torch"] == torch.__version__
    assert told["weights"].keys() == {"model", "text_encoder", "autoencoder", "adapter"}
    assert told["seconds"] > 0
    assert Image.open(sheet).size == (5 * 64, 2 * 64)
    assert Image.open(tmp_path / "sheet-base.jpg").size == (5 * 32, 2 * 32)


def test_the_same_seed_gives_the_same_figures_whatever_the_batch(options: list[str]) -> None:
    options = [*options, "--captions", "4", "--held-out", "2", "--steps", "1", "--models", "adapted"]
    first, second = (recall.main([*options, "--batch", batch])["models"]["adapted"] for batch in ("1", "6"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_nothing_drawn_of_a_part_makes_no_figures_and_no_bounds(options: list[str], tmp_path: Path) -> None:
    more = ["--captions", "1", "--held-out", "0", "--steps", "1", "--models", "base", "--json", str(tmp_path / "f")]
    recall.main([*options, *more])
    told = json.loads((tmp_path / "f").read_text())
    assert told["models"]["base"]["held_out"] == {
        "count": 0,
        "top1": None,
        "top5": None,
        "name": None,
        "style": None,
        "by_style": {},
    }
    assert len(told["bounds"]) == 2


def test_missing_weights_end_the_command_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.run(lambda: recall.main(["--model", str(tmp_path / "gone.safetensors")]))
    assert re.search(r"error: .*gone\.safetensors", capsys.readouterr().err)
    with pytest.raises(SystemExit) as ended:
        recall.main(["--every", "0"])
    assert ended.value.code == 2 and "at least 1, got '0'" in capsys.readouterr().err


def test_any_folder_of_captioned_pictures_gives_the_references(options: list[str], tmp_path: Path) -> None:
    for i, caption in enumerate(CAPTIONS):
        images.save_image(tmp_path / f"{i}.png", torch.rand(3, 64, 48) * 2 - 1)
        (tmp_path / f"{i}.txt").write_text(caption)
    told = recall.main([*options, "--images", str(tmp_path), "--every", "1", "--steps", "1", "--models", "adapted"])
    assert told["references"] == {"count": 6, "size": 32} and told["models"]["adapted"]["training"]["count"] == 6
