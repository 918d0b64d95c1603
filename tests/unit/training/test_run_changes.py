"""A run knows what it was made from and with: what changed is named, what is to change is said, and files tell it."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core.checkpoints import files, metadata
from davae_core.errors import DAVAEError
from davae_core.training import export
from davae_core.training.recipes import ADAPTER, AUTOENCODER
from davae_core.training.run import folder, launch, loop, origins, precision, recorded, resume, state
from davae_core.training.run.config import OptimiserConfig, RunConfig
from davae_core.training.run.launch import Images
from davae_core.training.stages import STAGES, Stage
from harness import toy_run
from harness.toy_run import FILE

COSINE = OptimiserConfig(lr=0.1, warmup=0, ema=0.9, schedule="cosine")
LOWER = OptimiserConfig(lr=0.05, warmup=0, ema=0.9)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return toy_run.draw_images(tmp_path / "images")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    files.save(path, {"weight": torch.arange(100.0)}, {})
    return path


@pytest.fixture
def out(tmp_path: Path, images: Path, base: Path) -> Path:
    """A run of four steps."""
    assert train(images, tmp_path / "run", steps=4, base=base) == loop.FINISHED
    return tmp_path / "run"


def train(images: Path, out: Path, **options: Any) -> int:
    return toy_run.run(toy_run.recipe(images, out, **options))


def test_a_changed_setting_is_refused_with_what_to_type_and_taken_where_it_is_named(
    images: Path, out: Path, base: Path
) -> None:
    with pytest.raises(
        DAVAEError, match=r"optimiser\.lr: was 0\.1, is 0\.05.*--run\.resume --run\.change optimiser\.lr$"
    ):
        train(images, out, base=base, resume=True, optimiser=LOWER)
    assert state.load(out).step == 4
    for change in ("optimiser.lr", "optimiser", "--optimiser.lr"):
        assert train(images, out, base=base, resume=True, optimiser=LOWER, change=(change,)) == loop.FINISHED
    saved = state.load(out)
    assert saved.step == 8 and saved.recipe["optimiser.lr"] == 0.05
    assert saved.about.changes == ("from step 4 on, optimiser.lr: was 0.1, is 0.05",)
    told = metadata.history_of(files.read_metadata(out / FILE)[1], FILE)
    assert told is not None
    assert (told.steps, told.learning_rate, told.recipe) == (8, 0.1, "line")
    assert told.settings["changes"] == list(saved.about.changes)


def test_a_change_of_nothing_or_without_resume_is_named(images: Path, out: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"no setting optimizer\.lr to change.*did you mean optimiser\.lr"):
        train(images, out, base=base, resume=True, change=("optimizer.lr",))
    with pytest.raises(DAVAEError, match=r"--run\.change names what differs.*give --run\.resume"):
        train(images, tmp_path / "new", base=base, change=("optimiser.lr",))


def test_a_change_of_a_folder_is_noted_by_its_name(out: Path) -> None:
    """Changes go into the files that are exported."""
    saved = state.load(out)
    saved.recipe["latents"], now = None, {**saved.recipe, "latents": "/home/me/latents", "text_encoder": "/a/t.sft"}
    saved.recipe["text_encoder"] = "/b/t.sft"
    run = RunConfig(out, resume=True, change=("latents", "text_encoder"))
    told = resume.changes(saved, now, saved.about.origins, run)
    assert set(told) == {"from step 4 on, latents: was None, is 'latents'", "from step 4 on, text_encoder: elsewhere"}


def test_an_average_may_begin_and_end_on_the_way(images: Path, out: Path, base: Path) -> None:
    for ema, steps in ((0.0, 5), (0.5, 6)):
        config = OptimiserConfig(lr=0.1, warmup=0, ema=ema)
        train(images, out, base=base, resume=True, steps=steps, optimiser=config, change=("optimiser.ema",))
        assert ("line/average/weight" in state.load(out).tensors) == bool(ema)


def test_another_base_file_at_the_same_place_is_named(images: Path, out: Path, base: Path) -> None:
    files.save(base, {"weight": torch.arange(100.0) + 1}, {})
    with pytest.raises(DAVAEError, match=r"base: was base\.safetensors \(\w{8}\), is base\.safetensors \(\w{8}\)"):
        train(images, out, base=base, resume=True)
    assert train(images, out, base=base, resume=True, change=("base",)) == loop.FINISHED
    assert state.load(out).about.changes[0].startswith("from step 4 on, base: was base.safetensors (")


def test_a_file_or_folder_that_only_moved_is_the_same(images: Path, out: Path, base: Path, tmp_path: Path) -> None:
    moved, elsewhere = base.rename(tmp_path / "moved.safetensors"), images.rename(tmp_path / "elsewhere")
    assert train(elsewhere, out, base=moved, resume=True) == loop.FINISHED
    assert state.load(out).about.changes == ()


@pytest.mark.parametrize("how", ["one more", "one larger", "renamed"])
def test_other_images_are_named(images: Path, out: Path, base: Path, how: str) -> None:
    if how == "one more":
        (images / "new.png").write_bytes((images / "0.png").read_bytes())
    elif how == "one larger":
        (images / "3.png").write_bytes((images / "3.png").read_bytes() + b"\0")
    else:
        (images / "3.png").rename(images / "9.png")
    now = 7 if how == "one more" else 6
    with pytest.raises(DAVAEError, match=rf"data\.images: was 6 images \(\w+\), is {now} images"):
        train(images, out, base=base, resume=True)
    assert train(images, out, base=base, resume=True, change=("data.images",)) == loop.FINISHED


@pytest.mark.parametrize("setting", ["prefix=a photo of", "suffix=, film", "repeats=4", "size=8"])
def test_what_is_said_of_images_is_named(images: Path, out: Path, base: Path, setting: str) -> None:
    now = {"images": (f"{images}::{setting}",)}
    with pytest.raises(DAVAEError, match=rf"data\.images: was .*images',\), is .*images::{setting}'.*data\.images$"):
        train(images, out, base=base, resume=True, data=now)
    assert state.load(out).step == 4
    assert train(images, out, base=base, resume=True, data=now, change=("data.images",)) == loop.FINISHED
    line = f"from step 4 on, data.images: was ('images',), is ('images::{setting}',)"
    assert state.load(out).about.changes == (line,), "without anybody's folders"


def test_other_images_of_which_other_things_are_said_are_named_with_both(images: Path, out: Path, base: Path) -> None:
    (images / "3.png").unlink()
    with pytest.raises(DAVAEError, match=r"is \('.*::repeats=4',\); data\.images: was 6 images \(.*, is 5 images"):
        train(images, out, base=base, resume=True, data={"images": (f"{images}::repeats=4",)})


def test_images_that_moved_with_what_is_said_of_them_are_the_same(images: Path, tmp_path: Path) -> None:
    settings, run = "::repeats=4::prefix=a photo of", tmp_path / "run"
    assert train(images, run, steps=4, data={"images": (f"{images}{settings}",)}) == loop.FINISHED
    moved = images.rename(tmp_path / "elsewhere")
    assert train(moved, run, resume=True, data={"images": (f"{moved}{settings}",)}) == loop.FINISHED
    assert state.load(run).about.changes == ()


def test_other_steps_under_a_cosine_are_another_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(images, out, steps=4, optimiser=COSINE) == loop.FINISHED
    with pytest.raises(
        DAVAEError, match=r"run\.steps: was 4, is 8, which changes the learning.*--run\.change run\.steps$"
    ):
        train(images, out, resume=True, optimiser=COSINE)
    assert train(images, out, steps=4, resume=True, optimiser=COSINE) == loop.FINISHED
    assert train(images, out, resume=True, optimiser=COSINE, change=("run.steps",)) == loop.FINISHED
    saved = state.load(out)
    assert saved.step == 8 and saved.about.changes[0].startswith("from step 4 on, run.steps: was 4, is 8")


def test_embeddings_that_were_added_to_are_the_same_embeddings(tmp_path: Path) -> None:
    made = []
    for keys in (["a"], ["a", "b"]):
        index = {"kind": "text_embeddings", "about": {"clip": "1234"}, "shards": [{"keys": keys}]}
        (tmp_path / "index.json").write_text(json.dumps(index))
        made.append(origins._of(tmp_path))
    assert made[0] == made[1]
    (tmp_path / "index.json").write_text(json.dumps({**index, "about": {"clip": "5678"}}))
    assert origins._of(tmp_path) != made[0]


def test_the_settings_lie_beside_the_state_whole_and_exact(images: Path, out: Path, base: Path) -> None:
    told = json.loads((out / "config.json").read_text())
    assert told["recipe"] == "line" and told["made_from"]["data.images"].startswith("6 images (")
    given = toy_run.recipe(images, out, steps=4, base=base)
    read = recorded.from_json(toy_run.LineRecipe, told["settings"])
    assert read.run.precision in ("fp32", "bf16")
    assert recorded.to_json(read) | {"run": None} == recorded.to_json(given) | {"run": None}
    assert (read.data, read.optimiser, read.base) == (given.data, given.optimiser, base)


@pytest.mark.parametrize(("name", "recipes"), [("micro", ADAPTER), ("micro-finish", AUTOENCODER)])
def test_a_recipe_comes_back_from_its_record(name: str, recipes: dict[str, tuple[str, Any]]) -> None:
    recipe = recipes[name][1]
    assert recorded.from_json(type(recipe), json.loads(json.dumps(recorded.to_json(recipe)))) == recipe


@dataclass(frozen=True)
class _Newer:
    run: Path | None = None


def test_a_record_of_another_version_is_named() -> None:
    assert recorded.from_json(_Newer, {}) == _Newer()
    with pytest.raises(DAVAEError, match="the setting gone, which this version does not know"):
        recorded.from_json(_Newer, {"gone": 1})


def test_checkpoints_stay_with_their_files_and_the_last_of_them_alone(images: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "run", tmp_path / "plain"
    assert train(images, out, keep_every=2, keep_last=2) == loop.FINISHED
    assert train(images, plain) == loop.FINISHED
    assert sorted(path.name for path in out.glob("step_*")) == ["step_0000004", "step_0000006"]
    tensors = {step: state.load(out / f"step_{step:07d}").tensors for step in (4, 6)}
    for step in (4, 6):
        average = files.read(out / f"step_{step:07d}" / FILE)[0]["weight"]
        assert torch.equal(average, tensors[step]["line/average/weight"])
    assert not torch.equal(tensors[4]["line/weight/weight"], tensors[6]["line/weight/weight"])
    for name, tensor in state.load(plain).tensors.items():  # keeping changes nothing
        assert torch.equal(tensor, state.load(out).tensors[name])


def test_a_checkpoint_is_no_link_to_the_state(images: Path, tmp_path: Path) -> None:
    """``cp step_0000002/state.safetensors .`` writes into the file that is there."""
    out = tmp_path / "run"
    assert train(images, out, steps=5, keep_every=2) == loop.FINISHED
    folder.keep_state(out, 5)
    shutil.copyfile(out / "step_0000002" / state.FILE, out / state.FILE)
    assert [state.load(out / f"step_{step:07d}").step for step in (2, 4, 5)] == [2, 4, 5]
    assert (out / "step_0000005" / state.FILE).stat().st_nlink == 1


def test_the_newest_checkpoints_are_those_written_last(images: Path, tmp_path: Path) -> None:
    """After going back to an earlier step the new ones stay, and the abandoned ones go."""
    out = tmp_path / "run"
    assert train(images, out, steps=13, keep_every=4) == loop.FINISHED
    shutil.copyfile(out / "step_0000004" / state.FILE, out / state.FILE)
    assert train(images, out, steps=8, keep_every=1, keep_last=2, resume=True) == loop.FINISHED
    assert sorted(path.name for path in out.glob("step_*")) == ["step_0000006", "step_0000007"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 there")
def test_names_may_be_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = (tmp_path / os.fsdecode(name) for name in (b"photos_\xe9t\xe9", b"run_\xe9"))
    toy_run.draw_images(images)
    base = tmp_path / os.fsdecode(b"base_\xe9") / os.fsdecode(b"base_\xe9.safetensors")
    files.save(base, {"weight": torch.arange(100.0)}, {})
    assert train(images, out, base=base.parent, steps=4, keep_every=2) == loop.FINISHED
    assert train(images, out, base=base.parent, resume=True) == loop.FINISHED
    told = json.loads((out / "config.json").read_bytes())
    assert recorded.from_json(toy_run.LineRecipe, told["settings"]).data.images == (str(images),)
    history = metadata.history_of(files.read_metadata(out / FILE)[1], FILE)
    assert history is not None and history.settings["data.images"] == str((images.name,))
    assert list((out / "samples").glob("*.png")) and not list(out.glob("events.*"))
    assert "TensorBoard opens no folder whose name is not UTF-8" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_kept_is_a_warning(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "step_0000004").write_text("in the way")
    assert train(images, out, keep_every=4) == loop.FINISHED
    assert "warning: the checkpoint" in capsys.readouterr().err


FAST, SLOW = "this device computes bf16", "this device emulates bf16"


@pytest.mark.parametrize(
    ("asked", "device", "before", "expected"),
    [
        ("auto", FAST, None, "bf16"),
        ("auto", SLOW, None, "fp32"),
        ("auto", FAST, "fp32", "fp32"),
        ("auto", SLOW, "fp32", "fp32"),
        ("auto", FAST, "bf16", "bf16"),
        ("bf16", SLOW, "bf16", "bf16"),
        ("fp32", FAST, "bf16", "fp32"),
    ],
)
def test_precision_is_settled_once_and_kept_on_other_hardware(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: Any,
    device: str,
    before: str | None,
    expected: str,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(precision, "computes_bf16", lambda _: device == FAST)
    assert precision.settled(asked, torch.device("cpu"), before) == expected
    assert any(message.startswith(f"precision: {expected}, ") for message in caplog.messages)


def test_a_device_that_cannot_go_on_in_the_runs_precision_says_what_to_type(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(precision, "computes_bf16", lambda _: True)
    assert train(images, out, steps=4) == loop.FINISHED
    assert state.load(out).recipe["run.precision"] == "bf16"
    monkeypatch.setattr(precision, "computes_bf16", lambda _: False)
    with pytest.raises(DAVAEError, match=r"--run\.precision fp32 --run\.change run\.precision"):
        train(images, out, resume=True)
    assert train(images, out, resume=True, precision="fp32", change=("run.precision",)) == loop.FINISHED
    assert state.load(out).recipe["run.precision"] == "fp32"


@pytest.mark.parametrize("stage", ["base_autoencoder", "base_dit", "autoencoder", "adapter"])
def test_files_are_exported_from_a_state_alone(stages: Any, tmp_path: Path, stage: str) -> None:
    """And tell how they were trained, and on what."""
    run = stages.folder(stage)
    export.main([str(run), "--out", str(tmp_path)])
    for name in stages.exports[stage]:
        again, now = files.read(tmp_path / name)
        first, told = files.read(run / name)
        assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in again)
        assert now.get(metadata.HISTORY) == told.get(metadata.HISTORY)
    told = metadata.history_of(files.read_metadata(run / stages.exports[stage][0])[1], "")
    assert told is not None
    assert (told.steps, told.learning_rate, told.recipe, told.seed) == (2, 1e-3, "micro", 0)
    of = {"base_autoencoder": set(), "base_dit": {"base_vae"}, "autoencoder": {"base_vae"}}
    assert set(told.of) == of.get(stage, {"base_model", "davae"})
    assert all(identity.values for identity in told.of.values())


@pytest.fixture
def line(images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Path]:
    """Trains a stage for four steps, whose export measures images or not; gives the run's folder."""

    def train_stage(measures: bool) -> Path:
        def build(made: toy_run.LineRecipe, seen: Images) -> toy_run.LineTask:
            def measure() -> None:
                assert not measures or list(seen())

            return toy_run.LineTask({"line": toy_run.Line()}, on_export=measure)

        stage = Stage("", toy_run.LineRecipe, {}, lambda recipe, run: run(recipe, 8, build))
        monkeypatch.setitem(STAGES, "line", stage)
        given = toy_run.recipe(images, tmp_path / "run", steps=4, keep_every=2, base=base)
        assert stage.train(given, partial(launch.launch, stage="line", name="line")) == loop.FINISHED
        return tmp_path / "run"

    return train_stage


@pytest.mark.parametrize("step", [0, 2])
def test_files_are_not_exported_with_another_base(line: Any, base: Path, tmp_path: Path, step: int) -> None:
    config = export.ExportConfig(line(False), step, tmp_path / "files")
    assert export.export(config) == [tmp_path / "files" / FILE]
    (tmp_path / "files" / FILE).unlink()
    files.save(base, {"weight": torch.arange(100.0) + 1}, {})
    said = r"base: was base\.safetensors \(\w{8}\), is base\.safetensors \(\w{8}\)\. Put back.*--run\.change base$"
    with pytest.raises(DAVAEError, match=said):
        export.export(config)
    assert not (tmp_path / "files" / FILE).exists()


@pytest.mark.parametrize("measures", [True, False])
def test_files_whose_statistics_need_other_images_are_not_exported(
    line: Any, images: Path, tmp_path: Path, measures: bool
) -> None:
    config = export.ExportConfig(line(measures), out=tmp_path / "files")
    assert export.export(config) == [tmp_path / "files" / FILE]
    shutil.rmtree(tmp_path / "files")
    (images / "3.png").unlink()
    if measures:
        with pytest.raises(
            DAVAEError, match=r"data\.images: was 6 images \(\w+\), is 5 images.*--run\.change data\.images$"
        ):
            export.export(config)
    else:
        assert export.export(config) == [tmp_path / "files" / FILE]
    assert (tmp_path / "files").exists() != measures


def test_a_step_that_was_not_kept_is_named(images: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "run", keep_every=4)
    with pytest.raises(DAVAEError, match="holds no state of that step; there are 4"):
        export.export(export.ExportConfig(tmp_path / "run", 6))
