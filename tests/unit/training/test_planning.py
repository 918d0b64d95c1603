"""The planner: the full-size recipes in 24 GB, and what it counts beside what real trainings take."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from davae_core.autoencoder import AutoencoderConfig
from davae_core.errors import DAVAEError
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.training.planning import phases, plan
from davae_core.training.planning.counter import counting
from davae_core.training.planning.phases import Counted
from davae_core.training.planning.skeletons import Recipe, empty
from davae_core.training.run import launch
from davae_core.training.stages import STAGES
from davae_core.training.tasks import pieces
from davae_core.training.tasks.adapter import AdapterRecipe
from davae_core.training.tasks.autoencoder import AutoencoderRecipe
from davae_core.training.tasks.few_steps import FewStepsRecipe
from davae_core.training.tasks.predictor import PredictorRecipe

ROOT = Path(__file__).parents[3]
BASE = AutoencoderConfig(widths=(32, 32, 64, 64), blocks=1)
MODEL = MMDiTConfig(hidden=512, depth=3, grid=48, context=256, pooled=256, dual_attention=(0, 1))
FULL_SIZE = [
    f"{family}_{name}"
    for family in ("sd3", "flux")
    for name in ("vae_f16", "vae_f16_robust", "predictor", "tiny_decoder")
] + ["sd3_vae_f16_redrawn", "sd35m_1024", "sd35m_2048", "sd35m_fast"]
ONE_GPU = plan.PlanConfig(gpus=1, memory=24)


def known(name: str) -> Recipe:
    return next(stage.recipes[name][1] for stage in STAGES.values() if name in stage.recipes)


@cache
def toy(stage: str) -> Recipe:
    """A full-size recipe for toy models, in fp32."""
    names = {"adapter": "sd35m_1024", "steps": "sd35m_fast", "autoencoder": "sd3_vae_f16", "predictor": "sd3_predictor"}
    recipe = known(names[stage])
    run = replace(recipe.run, precision="fp32")
    if isinstance(recipe, AdapterRecipe | FewStepsRecipe):
        return replace(recipe, data=replace(recipe.data, size=384), run=run, rank=32, frozen="fp32")
    assert isinstance(recipe, AutoencoderRecipe | PredictorRecipe)
    return replace(recipe, data=replace(recipe.data, size=192), run=run, gradient_checkpointing=False)


def measured(memory: phases.Memory, recipe: Recipe, several: bool = False, only_step: bool = False) -> Counted:
    return phases.measure(recipe, 2, 100, memory, several, only_step, MODEL, BASE)


class Resident:
    """The memory of this process, as Linux knows it."""

    flops = 0

    @property
    def live(self) -> int:
        return self._of("VmRSS")

    @property
    def peak(self) -> int:
        return self._of("VmHWM")

    def restart(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def _of(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def take_for_real(stage: str) -> None:
    """In a process of its own: all phases with real tensors; prints the bytes above those of the libraries."""
    launch.SURVEY_BATCH = 1
    pieces.LARGEST = 32 * 384**2  # one image at a time
    recipe, memory = toy(stage), Resident()
    measured(memory, replace(recipe, data=replace(recipe.data, size=64)))  # loads the libraries
    libraries = memory.live
    out = measured(memory, recipe, several=True)
    print(json.dumps({name: peak - libraries for name, peak in (out.peaks | {"held": out.held}).items()}))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the memory of a process")
@pytest.mark.parametrize(
    "stage", [pytest.param("adapter", marks=pytest.mark.slow), "steps", "autoencoder", "predictor"]
)
def test_real_phases_take_the_memory_that_is_counted(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", f"import test_planning; test_planning.take_for_real({stage!r})"]
    # What is freed goes back to the system at once.
    told = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    ended = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    real = json.loads(ended.stdout.splitlines()[-1])
    monkeypatch.setattr(launch, "SURVEY_BATCH", 1)
    monkeypatch.setattr(pieces, "LARGEST", 32 * 384**2)
    with counting(cuda=False) as memory:
        counted = measured(memory, toy(stage), several=True)
    assert real.keys() == {*counted.peaks, "held"}
    for name, count in (counted.peaks | {"held": counted.held}).items():
        print(f"{stage}, {name}: counted {count / 1e6:.0f} MB, measured {real[name] / 1e6:.0f} MB")
        assert 0.9 * count < real[name] < 1.15 * count + 50e6, name


@pytest.mark.parametrize("name", FULL_SIZE)
def test_all_phases_of_a_recipe_fit_24_gb_with_a_tenth_left_free(name: str) -> None:
    recipe = known(name)
    counted = plan.on_one(recipe, recipe.run.micro_batch, ONE_GPU)
    print(name, recipe.run.micro_batch, {phase: f"{peak / 1e9:.1f} GB" for phase, peak in counted.peaks.items()})
    assert {"step", "sheet", "export"} <= counted.peaks.keys()
    assert 0.5e9 < counted.held < min(counted.peaks.values())
    assert counted.most <= 0.9 * 24e9


def test_few_steps_are_taught_on_16_gb_by_three_models_too() -> None:
    recipe = replace(known("sd35m_fast"), method="distribution")
    counted = plan.on_one(recipe, 1, ONE_GPU, only_step=True)
    assert counted.peaks["step"] <= 0.9 * 16e9


def test_without_recomputation_a_predictor_does_not_fit_24_gb() -> None:
    """One image alone: gradients go through the frozen decoder, whose activations are kept."""
    plain = replace(known("sd3_predictor"), gradient_checkpointing=False)
    assert plan.on_one(plain, 1, ONE_GPU, only_step=True).most > 0.9 * 24e9


def test_latents_without_numbers_are_taken_for_no_other_bases(caplog: pytest.LogCaptureFixture) -> None:
    plan.on_one(known("flux_vae_f16"), 1, ONE_GPU, only_step=True)
    assert not caplog.records


def test_a_predictor_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--gpus", "1", "--memory", "24", "--recipe", "flux_predictor", "--micro-batch", "2"]) == 0
    said = capsys.readouterr().out
    assert "flux_predictor: 1024 px, batch 32 = 1 GPUs x 32 images" in said and "of 24 GB: fits" in said


def test_the_plan_is_printed_with_its_phases(capsys: pytest.CaptureFixture[str]) -> None:
    micro = known("sd3_vae_f16").run.micro_batch
    args = f"--gpus 1 --recipe sd3_vae_f16 --images 100k --micro-batch {micro} --memory".split()
    assert plan.main([*args, "24"]) == 0
    said = capsys.readouterr().out
    assert "sd3_vae_f16: 1024 px, batch 128 = 1 GPUs x 128 images" in said
    for line in ("step  ", "sheet  ", "statistics  ", "export", "of 24 GB: fits", "a pass over 100,000"):
        assert line in said
    assert plan.main([*args, "5"]) == 1
    assert "of 5 GB: does NOT fit" in capsys.readouterr().out


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    recipe = replace(known("sd3_vae_f16"), run=replace(known("sd3_vae_f16").run, batch=4, micro_batch=1))
    for memory, expected in ((12, 1), (24, 2)):
        made = plan.plan("r", recipe, replace(ONE_GPU, memory=memory))
        assert (made.fits, made.micro_batch) == (True, expected)
    assert not plan.plan("r", recipe, replace(ONE_GPU, memory=5)).fits


def test_the_arithmetic_of_sd35_medium_is_that_of_the_paper() -> None:
    # One prediction of one image, with 154 text tokens; TFLOP.
    with counting() as memory, torch.no_grad():
        model = empty(lambda: MMDiT(MMDiTConfig()))
        for side, expected in ((32, 2.14), (128, 88.3)):
            memory.restart()
            model(
                torch.zeros(1, 16, 2 * side, 2 * side), torch.zeros(1), torch.zeros(1, 154, 4096), torch.zeros(1, 2048)
            )
            assert memory.flops / 1e12 == pytest.approx(expected, rel=0.01)


def test_buckets_of_gradients_are_held_between_steps() -> None:
    held = []
    for several in (False, True):
        with counting(cuda=False) as memory:
            counted = measured(memory, toy("adapter"), several, only_step=True)
        held.append(counted.peaks["step"])
    assert held[0] == pytest.approx(held[1], rel=0.02)


def test_sharding_leaves_a_part_of_what_is_trained_and_gathers_it_for_the_export() -> None:
    with counting(cuda=False) as memory:
        counted = measured(memory, toy("adapter"))
    one, two = counted.sharded(1), counted.sharded(2)
    assert one.held == counted.held
    assert counted.held - two.held == pytest.approx(counted.cut / 2, abs=1)
    assert 4 * 4 * counted.trained < counted.cut < counted.held
    assert one.peaks["export"] - two.peaks["export"] == pytest.approx((counted.cut - counted.weights) / 2, abs=2)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--gpus 7", "batch of 128 .* cannot be divided among 7 GPUs"),
        ("--recipe sd4", "no recipe 'sd4' to plan; choose one of flux_predictor, flux_tiny_decoder, flux_vae_f16, "),
        ("--size 1000", "1000 is not a multiple of 32; use 992 or 1024"),
        ("--images many", "100k or 1.5M, got 'many'"),
    ],
)
def test_what_cannot_be_planned_is_said(args: str, said: str) -> None:
    with pytest.raises(DAVAEError, match=said):
        plan.main(args.split())


def test_a_machine_that_there_cannot_be_is_refused() -> None:
    with pytest.raises(DAVAEError, match="utilisation in"):
        plan.PlanConfig(utilisation=2.0)
