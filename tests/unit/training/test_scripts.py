"""The four training scripts from end to end, two steps each, and what they say to the person who starts them."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from davae_core import checkpoints, command
from davae_core.adapter import merge
from davae_core.checkpoints import files
from davae_core.checkpoints.detect import detect
from davae_core.errors import DAVAEError
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.training import pretrained
from davae_core.training.recipes import tiny as recipes
from davae_core.training.run import config
from harness import warm

STAGES = ["base_autoencoder", "base_dit", "autoencoder", "adapter"]
RECIPES: dict[str, dict[str, tuple[str, Any]]] = {
    "base_autoencoder": recipes.BASE_AUTOENCODER,
    "base_dit": recipes.BASE_DIT,
    "autoencoder": recipes.AUTOENCODER,
    "adapter": recipes.ADAPTER,
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_its_files_its_state_its_curves_and_its_sheet(stages: Any, stage: str) -> None:
    out = stages.folder(stage)
    there = {path.name for path in out.iterdir() if not path.name.startswith("events.")}
    assert there == {*stages.exports[stage], "state.safetensors", "config.json", "data.json", "samples"}
    curves = stages.curves(out)
    assert {"lr", "skipped"} < set(curves)
    assert all(set(points) == {1, 2} for points in curves.values())
    assert set(curves["skipped"].values()) == {0.0}
    assert any(name.endswith("/loss") for name in curves)


@pytest.mark.parametrize(("stage", "rows"), list(zip(STAGES, (2, 2, 4, 3), strict=True)))
def test_the_sheet_is_a_picture_of_the_batch_above_what_became_of_it(stages: Any, stage: str, rows: int) -> None:
    (sheet,) = (stages.folder(stage) / "samples").iterdir()
    side = stages.sizes[stage]
    assert sheet.name == "step_0000002.png"
    with Image.open(sheet) as image:
        assert image.size == (4 * side, rows * side)
        assert len(np.unique(np.asarray(image)[:side])) > 50


def test_the_adapter_logs_the_losses_of_base_and_detail_apart(stages: Any) -> None:
    curves = stages.curves(stages.folder("adapter"))
    assert {"adapter/base", "adapter/detail", "adapter/detail_weight"} < set(curves)
    assert curves["adapter/detail_weight"][1] == 0.0 < curves["adapter/detail_weight"][2] < 1.0


def test_the_base_autoencoder_is_a_file_in_the_layout_of_sd3(stages: Any) -> None:
    model = pretrained.base_vae(stages.file("base_autoencoder"))
    assert model.config.widths == (32, 32, 32, 64)
    shapes, _ = files.read_metadata(stages.file("base_autoencoder"))
    assert shapes["encoder.conv_out.weight"] == (32, 64, 3, 3)


def test_the_base_model_is_a_file_in_the_layout_of_sd35(stages: Any) -> None:
    state, _ = files.read(stages.file("base_dit"))
    config = MMDiTConfig.from_state_dict(state)
    assert (config.hidden, config.depth, config.dual_attention, config.in_channels) == (64, 2, (0,), 16)
    MMDiT(config).load_state_dict(state)


def test_the_text_encoder_knows_the_words_of_the_captions(stages: Any) -> None:
    encoder = checkpoints.load_text_encoder(stages.file("base_dit", 1))
    assert set(encoder.config.vocabulary) == {"flat", "round", "wave", *"01234567"}


def test_the_da_vae_decodes_what_it_encodes(stages: Any) -> None:
    model = checkpoints.load_autoencoder(stages.file("autoencoder"))
    x = torch.rand(1, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        z = model.encode(x)
        assert z.shape == (1, 32, 2, 4)
        assert model.decode(z).shape == x.shape
    assert model.base_decoder is not None


def test_the_adapter_fits_the_base_model_and_says_how_to_sample(stages: Any) -> None:
    adapter = checkpoints.load_adapter(stages.file("adapter"))
    base, _ = files.read(stages.file("base_dit"))
    assert MMDiTConfig.from_state_dict(merge(base, adapter)).in_channels == 32
    davae = checkpoints.load_autoencoder(stages.file("autoencoder"))
    assert adapter.config.latent == davae.latent
    assert (adapter.config.recommended.size, adapter.config.recommended.steps) == (32, 3)


def test_every_file_is_recognised_by_its_shapes(stages: Any) -> None:
    kinds = {}
    for stage in ("base_dit", "autoencoder", "adapter"):
        for name in stages.exports[stage]:
            shapes, info = files.read_metadata(stages.folder(stage) / name)
            kinds[name] = detect(shapes, info.get("davae.kind")).kind
    assert len(set(kinds.values())) == 4, kinds


@pytest.mark.skipif(importlib.util.find_spec("stlpips_pytorch") is None, reason="needs stlpips_pytorch")
def test_the_perceptual_loss_is_one_more_curve(stages: Any, tmp_path: Path) -> None:
    more = ["--losses.perceptual", "0.5", "--losses.network", "st-lpips-alex"]
    assert stages.run("autoencoder", tmp_path / "run", 1, *more) == 0
    curves = stages.curves(tmp_path / "run")
    parts = {name: curves[f"autoencoder/{name}"][1] for name in ("loss", "l1", "perceptual", "kl", "alignment")}
    assert parts["perceptual"] > 0
    told = 2 * parts["l1"] + 0.5 * parts["perceptual"] + 1e-7 * parts["kl"] + 0.2 * parts["alignment"]
    assert parts["loss"] == pytest.approx(told, rel=1e-5)
    assert not any("distance" in name for name in stages.weights(tmp_path / "run"))


def test_images_without_captions_are_refused_where_captions_are_needed(stages: Any, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    with pytest.raises(DAVAEError, match="caption"):
        stages.run("base_dit", tmp_path / "run", 1, "--data.images", str(tmp_path))


def test_a_missing_base_file_is_named(stages: Any, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"nowhere\.safetensors"):
        stages.run("autoencoder", tmp_path / "run", 1, "--base", str(tmp_path / "nowhere.safetensors"))


def test_a_size_that_the_model_cannot_take_is_refused(stages: Any, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match="48 is not a multiple of 32; use 32 or 64"):
        stages.run("adapter", tmp_path / "run", 1, "--data.size", "48")


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_field_and_explains_it(
    stages: Any, stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")  # narrower than two columns of options
    with pytest.raises(SystemExit) as end:
        stages.main[stage](["micro", "--help"])
    assert end.value.code == 0
    lines = [line.strip("\u2502 ") for line in capsys.readouterr().out.splitlines()]
    entries = re.split(r"\n(?=--)", "\n".join(lines))
    fields = config.flat(RECIPES[stage]["micro"][1])
    assert len(fields) > 25
    for name in fields:
        flag = "--" + name.replace("_", "-")
        (entry,) = [entry for entry in entries if re.match(rf"{re.escape(flag)}[ ,]", entry)]
        explained = re.split(r"\s{2,}|\n", entry, maxsplit=1)[1].partition("(default")[0]
        assert re.search(r"[A-Za-z]", explained), f"{flag} is not explained: {entry}"


@pytest.mark.parametrize("stage", STAGES)
def test_recipes_are_taken_by_name(stages: Any, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        stages.main[stage](["huge"])
    assert end.value.code != 0
    said = capsys.readouterr()
    assert "micro" in said.out + said.err and "tiny" in said.out + said.err


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_option_is_refused(stages: Any, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        stages.main[stage](["micro", "--run.stepps", "3"])
    assert end.value.code != 0
    said = capsys.readouterr()
    assert "--run.stepps" in said.out + said.err


def raising(problem: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise problem

    return run


@pytest.mark.parametrize(
    ("run", "code"),
    [
        (lambda: 0, 0),
        (lambda: 130, 130),
        (raising(DAVAEError("no images")), 2),
        (raising(KeyboardInterrupt()), 130),
    ],
)
def test_the_exit_code_says_how_it_ended(run: Callable[[], int], code: int) -> None:
    with pytest.raises(SystemExit) as end:
        command.run(run)
    assert end.value.code == code


def test_what_a_person_can_put_right_is_said_in_a_line_and_without_a_traceback(stages: Any, tmp_path: Path) -> None:
    command = stages.command("base_dit", tmp_path / "run", 1, "--data.size", "20")
    ended = warm.run("davae_core.training", "base_dit", *command)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: the size 20 is not a multiple of 16; use 16 or 32")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_script_runs_as_a_module(stages: Any, tmp_path: Path, stage: str) -> None:
    ended = warm.run("davae_core.training", stage, *stages.command(stage, tmp_path / "run", 2))
    assert ended.returncode == 0, ended.stderr
    for name in stages.exports[stage]:
        assert f"wrote {tmp_path / 'run' / name}" in ended.stderr
