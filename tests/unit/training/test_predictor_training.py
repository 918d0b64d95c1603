"""The predictor's stage: what it learns, what it leaves, and that only the predictor is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints, tiny
from davae_core.checkpoints import files, metadata
from davae_core.errors import DAVAEError
from davae_core.training import stages as entry
from davae_core.training.run import state


def run(stages: Any, out: Path, steps: int, *more: str) -> int:
    """Train on the toy pictures, in this process."""
    common = f"micro --data.images {stages.images} --data.size 32 --run.out {out} --run.steps {steps} --run.batch 4"
    common += (
        " --run.log-every 1 --run.sample-every 0 --optimiser.warmup 0 --optimiser.ema 0 --width 64 --blocks 1 --no-vary"
    )
    given = f"--autoencoder {stages.file('autoencoder')} --run.precision fp32"
    return entry.run("predictor", [*common.split(), *given.split(), *more])


def test_it_learns_the_detail_that_the_base_tells(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path, 60, "--base-noise", "0") == 0
    losses = stages.curves(tmp_path)["predictor/latent"]
    assert losses[60] < 0.5 * losses[1]
    predictor = checkpoints.load_predictor(tmp_path / tiny.PREDICTOR)
    davae = checkpoints.load_autoencoder(stages.file("autoencoder"), torch.float32)
    assert predictor.latent == davae.latent
    assert predictor.complete(torch.randn(1, 16, 2, 2)).shape == (1, 32, 2, 2)


def test_a_file_tells_which_davae_it_is_for(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path, 1) == 0
    history = metadata.history_of(files.read_metadata(tmp_path / tiny.PREDICTOR)[1], tiny.PREDICTOR)
    assert history is not None and history.of["davae"].name == tiny.AUTOENCODER and history.of["davae"].values


def test_the_picture_counts_where_it_is_asked_for(stages: Any, tmp_path: Path) -> None:
    """Then the decoder passes gradients on, and stays what it is."""
    assert run(stages, tmp_path, 3, "--losses.l1", "1", "--latent", "0") == 0
    curves = stages.curves(tmp_path)
    assert curves["predictor/loss"][1] == pytest.approx(curves["predictor/l1"][1])
    assert curves["predictor/gradient"][2] > 0
    assert all("decoder" not in name for name in state.load(tmp_path).tensors)


@pytest.mark.parametrize(
    "vary",
    ["--no-vary --no-keep-latents", "--vary --variants 0 --no-keep-latents", "--vary --variants 3 --keep-latents"],
    ids=["plain", "other variants", "three variants, kept"],
)
def test_a_resumed_run_is_the_run(stages: Any, tmp_path: Path, vary: str) -> None:
    more = ("--optimiser.schedule", "constant", *vary.split())
    assert run(stages, tmp_path / "whole", 4, *more) == 0
    assert run(stages, tmp_path / "cut", 2, *more) == 0
    assert run(stages, tmp_path / "cut", 4, *more, "--run.resume") == 0
    one, two = (state.load(tmp_path / name).tensors for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--vary --variants 0 --keep-latents", "cannot be kept.*--variants 3.*--no-keep-latents"),
        ("--vary --variants -1", "at least 0, got -1"),
        ("--width 33", "--width must be a multiple of 32, as 32, got 33"),
        ("--width 0", "--width must be a multiple of 32, as 32, got 0"),
        ("--blocks -1", "--blocks must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(stages: Any, tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(DAVAEError, match=said):
        run(stages, tmp_path, 1, *more.split())


def test_it_goes_on_from_a_predictor(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path / "first", 2) == 0
    start = tmp_path / "first" / tiny.PREDICTOR
    assert run(stages, tmp_path / "more", 1, "--start", str(start), "--optimiser.lr", "0") == 0
    one, two = (checkpoints.load_predictor(p) for p in (start, tmp_path / "more" / tiny.PREDICTOR))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor)


def test_a_predictor_of_another_shape_is_no_start(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path / "first", 1) == 0
    with pytest.raises(DAVAEError, match=r"--start.*width 64.*1 block.*--width"):
        run(stages, tmp_path / "more", 1, "--start", str(tmp_path / "first" / tiny.PREDICTOR), "--width", "96")


def test_it_is_measured_on_held_out_pictures(stages: Any, tmp_path: Path) -> None:
    assert run(stages, tmp_path, 1, "--data.held-out", "25%") == 0
    told = (tmp_path / "validation.jsonl").read_text("utf-8")
    assert all(f"{kind}/psnr" in told for kind in ("base_bicubic", "detail_0", "predicted", "davae"))
