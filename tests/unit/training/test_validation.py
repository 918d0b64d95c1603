"""Validation: held-out images and fixed prompts, measured with the averaged weights, kept as curves and lines."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from davae_core import checkpoints, images, tiny
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import files
from davae_core.errors import DAVAEError
from davae_core.flow import velocity
from davae_core.held_out import TIMES, velocity_errors
from davae_core.history import History
from davae_core.metrics import psnr, resize_bicubic
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.sampling import encode_captions, initial_noise
from davae_core.training.data.dataset import DataConfig
from davae_core.training.objective import ReconstructionConfig
from davae_core.training.run import loop
from davae_core.training.run.config import OptimiserConfig, RunConfig
from davae_core.training.run.task import Batch, Losses, Phase
from davae_core.training.run.validation import Validation
from davae_core.training.tasks.adapter import AdapterRecipe, AdapterTask
from davae_core.training.tasks.autoencoder import AutoencoderRecipe, AutoencoderTask
from davae_core.training.text.asked import Asked, read_prompts

GROUPS = {"base": slice(2), "detail": slice(2, None)}
Stages = Any  # of conftest.py
Read = Callable[[Path], dict[str, dict[int, float]]]


def held_out(count: int, size: int = 8, batch: int = 2) -> Callable[[], Iterator[Batch]]:
    """What the data of a run gives: batches of ``count`` held-out images, grey ``0, 0.1, ...``."""
    images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, size, size) / 10
    captions = [f"flat wave {i}" for i in range(count)]

    def batches() -> Iterator[Batch]:
        for start in range(0, count, batch):
            yield {"image": images[start : start + batch], "caption": captions[start : start + batch]}

    return batches


# --- velocities by noise level ----------------------------------------------------------------------------------------


def test_a_model_that_knows_the_image_has_no_error_and_one_that_predicts_nothing_the_velocitys_square() -> None:
    z = torch.randn(3, 5, 4, 4)
    noise = initial_noise(0, range(3), z.shape[1:])
    perfect = velocity_errors(lambda x, t, captions: velocity(z, noise), [(z, [""] * 3)], GROUPS)
    assert all(value < 1e-10 for name, value in perfect.items() if name != "images")
    told = velocity_errors(lambda x, t, captions: torch.zeros_like(x), [(z, [""] * 3)], GROUPS)
    assert told["base"] == pytest.approx(velocity(z, noise)[:, :2].square().mean().item(), rel=1e-5)
    assert told["detail/t0.5"] == pytest.approx(velocity(z, noise)[:, 2:].square().mean().item(), rel=1e-5)
    assert told["images"] == 3 and len(told) == 3 + 2 * len(TIMES)


def test_the_figures_do_not_depend_on_how_images_are_put_into_batches() -> None:
    z = torch.randn(4, 5, 4, 4)
    captions = ["a", "bb", "ccc", "dddd"]

    def predict(x: torch.Tensor, t: torch.Tensor, captions: Iterable[str]) -> torch.Tensor:
        return x * torch.tensor([len(caption) for caption in captions]).view(-1, 1, 1, 1) * t.view(-1, 1, 1, 1)

    whole = velocity_errors(predict, [(z, captions)], GROUPS)
    parts = velocity_errors(predict, [(z[:3], captions[:3]), (z[3:], captions[3:])], GROUPS)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert velocity_errors(predict, [(z, captions[::-1])], GROUPS)["base"] != pytest.approx(whole["base"], rel=0.1)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_have_their_number_or_their_own_seed(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# eyes\na red heart\n\n  a peach --d 42 \n--d 7\n3d --dog\n", encoding="utf-8")
    expected = [Asked("a red heart", 0), Asked("a peach", 42), Asked("", 7), Asked("3d --dog", 3)]
    assert read_prompts(path) == expected


@pytest.mark.parametrize(("text", "said"), [(None, "cannot be read"), ("# none\n\n", "holds no prompts")])
def test_a_file_without_prompts_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DAVAEError, match=rf"prompts\.txt.*{said}.*--run\.prompts"):
        read_prompts(path)


def test_a_sheet_shows_the_first_held_out_images_whatever_the_batch(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a peach --d 5")
    batch: Batch = {"image": torch.ones(2, 3, 8, 8), "caption": ["a", "b"]}
    shown = Validation(held_out(11, batch=3)).sheet(batch)
    assert shown["image"][:, 0, 0, 0].tolist() == pytest.approx([i / 10 for i in range(8)])
    assert shown["caption"] == [f"flat wave {i}" for i in range(8)]
    assert Validation().sheet(batch) is batch
    asked = Validation(None, tmp_path / "prompts.txt").sheet(batch)
    assert asked["asked"] == [Asked("a peach", 5)] and asked["image"] is batch["image"]


# --- the loop ---------------------------------------------------------------------------------------------------------


class Point(Phase):
    """A weight that is pulled to 3."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch, step: int) -> Losses:
        return {"loss": (self.weight - 3).square().sum()}


class PointTask:
    """Measures nothing but how far the weight is and what it was given."""

    def __init__(self) -> None:
        self.point = Point()
        self.phases: dict[str, Phase] = {"point": self.point}
        self.shown: list[list[str]] = []

    def to(self, device: torch.device) -> None:
        pass

    def sheet(self, batch: Batch) -> torch.Tensor:
        self.shown.append(batch["caption"])
        return torch.zeros(3, 8, 8)

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        return {"weight": self.point.weight.item(), "images": float(sum(len(b["image"]) for b in batches))}

    def export(self, folder: Path, history: History) -> list[Path]:
        return []


def train(task: PointTask, out: Path, steps: int, **options: Any) -> None:
    def batches(start: int) -> Iterator[Batch]:
        for step in itertools.count(start):
            yield {
                "step": step,
                "micro": 0,
                "micros": 1,
                "share": 1.0,
                "image": torch.zeros(1, 3, 8, 8),
                "caption": [f"of {step}"],
            }

    run = RunConfig(out, steps=steps, log_every=1, sample_every=2, **options)
    optimiser = OptimiserConfig(lr=0.1, warmup=0, ema=0.5)
    assert (
        loop.train(task, {}, run, optimiser, Accelerator(), batches, validation=Validation(held_out(5)))
        == loop.FINISHED
    )


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]


def test_held_out_images_are_measured_at_the_start_now_and_then_and_at_the_end(tmp_path: Path, curves: Read) -> None:
    task = PointTask()
    train(task, tmp_path, 5, validate_every=2)
    told = lines(tmp_path)
    assert [(line["step"], line["images"]) for line in told] == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert curves(tmp_path)["validation/weight"] == pytest.approx({line["step"]: line["weight"] for line in told})
    assert 0 < told[-1]["weight"] < task.point.weight.item() - 0.01, "measured with the averages"
    assert task.shown == [[f"flat wave {i}" for i in range(5)]] * 3


def test_a_resumed_run_adds_lines_and_repeats_none(tmp_path: Path) -> None:
    train(PointTask(), tmp_path, 4, validate_every=2)
    (tmp_path / "validation.jsonl").open("a").write('{"step": 6, "weight": 9}\n')  # lost when the run was cut off
    train(PointTask(), tmp_path, 6, validate_every=2, resume=True)
    assert [line["step"] for line in lines(tmp_path)] == [0, 2, 4, 6]
    assert lines(tmp_path)[-1]["weight"] < 3


# --- the tasks --------------------------------------------------------------------------------------------------------


def test_an_untrained_adapter_has_the_base_models_error_and_the_whole_velocity_as_that_of_the_detail(
    tmp_path: Path,
) -> None:
    recipe = AdapterRecipe(
        data=DataConfig((), size=64),
        run=RunConfig(tmp_path),
        model=tiny.FOLDERS["diffusion_models"] / tiny.MODEL,
        text_encoder=tiny.FOLDERS["text_encoders"] / tiny.TEXT_ENCODER,
        autoencoder=tiny.FOLDERS["vae"] / tiny.AUTOENCODER,
        rank=2,
    )
    task = AdapterTask(recipe, lambda: [])
    told = task.validate(held_out(3, size=64)())
    z = task.encode(torch.cat([batch["image"] for batch in held_out(3, size=64)()]))
    v = velocity(z, initial_noise(0, range(3), z.shape[1:]))
    assert told["detail"] == pytest.approx(v[:, 16:].square().mean().item(), rel=1e-4)

    def base(x: torch.Tensor, t: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        return torch.cat([model(x[:, :16], t, *encode_captions(text, captions)), x[:, 16:]], dim=1)

    state = {name: tensor.float() for name, tensor in files.read(recipe.model)[0].items()}
    model = MMDiT(MMDiTConfig.from_state_dict(state))
    model.load_state_dict(state)
    text = checkpoints.load_text_encoder(tiny.FOLDERS["text_encoders"] / tiny.TEXT_ENCODER).float()
    own = velocity_errors(base, [(z, [f"flat wave {i}" for i in range(3)])], {"base": slice(16)})
    assert {name: told[name] for name in own} == pytest.approx(own, rel=1e-3)
    assert {name for name in told if "/" in name} == {f"{part}/t{t}" for part in ("base", "detail") for t in TIMES}
    stored: Batch = {"latent": z, "caption": [f"flat wave {i}" for i in range(3)]}
    assert task.validate([stored]) == pytest.approx(told, rel=1e-3), "latents that lie ready serve as well"
    assert task.sheet(stored).shape == (3, 2 * 64, 3 * 64)
    sheet = task.sheet({"image": torch.zeros(1, 3, 64, 64), "caption": ["a"], "asked": [Asked("3d peach", 5)] * 2})
    assert sheet.shape == (3, 64, 128) and torch.equal(sheet[..., :64], sheet[..., 64:])


def test_a_davae_is_measured_beside_its_base_vae(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = Autoencoder(AutoencoderConfig(widths=(32, 32, 32, 64), blocks=1))
    files.save(tmp_path / "base.safetensors", base.state_dict(), {})
    recipe = AutoencoderRecipe(
        DataConfig((), size=32),
        RunConfig(tmp_path),
        tmp_path / "base.safetensors",
        losses=ReconstructionConfig(network="st-lpips-alex"),
    )
    task = AutoencoderTask(recipe, lambda: [])
    told = task.validate(held_out(3, size=32)())
    x = torch.cat([batch["image"] for batch in held_out(3, size=32)()])
    with torch.no_grad():
        z = task.model.encode(x)
        small = task.model.decode_base(z[:, :16]).clamp(-1, 1)
        y = task.model.decode(z).clamp(-1, 1)
    assert told["davae/psnr"] == pytest.approx(psnr(y, x).mean().item(), abs=1e-2)
    assert told["base_bicubic/psnr"] == pytest.approx(psnr(resize_bicubic(small, 2), x).mean().item(), abs=1e-2)
    assert told["davae/st-lpips-alex"] > 0


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "figures"),
    [
        ("autoencoder", ["davae/psnr", "base_bicubic/psnr"]),
        ("adapter", ["base", "detail", "detail/t0.9"]),
    ],
)
def test_a_run_with_held_out_images_measures_and_shows_them(
    stages: Stages, stage: str, figures: list[str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("flat wave 0\nround wave 1 --d 5\nflat wave 2\n")
    out, held = tmp_path / "out", tmp_path / "held"
    held.mkdir()
    for name in ("0.png", "0.txt", "1.png", "1.txt"):
        shutil.copy(stages.images / name, held / name)
    options = ["--data.held-out", str(held), "--run.validate-every", "1"]
    assert stages.run(stage, out, 2, *options, "--run.prompts", str(tmp_path / "prompts.txt")) == 0
    told = lines(out)
    assert [line["step"] for line in told] == [0, 1, 2]
    assert set(figures) <= told[0].keys() and all(line[name] == line[name] for line in told for name in figures)
    sheet = images.read_image(out / "samples" / "step_0000002.png")
    # Three prompts are drawn; an autoencoder shows the two held-out images.
    assert sheet.shape[2] == stages.sizes[stage] * (3 if stage == "adapter" else 2)
