"""The planner against what PyTorch counts, and against the memory of real training steps in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from davae_core.adapter import LORA_MODULES
from davae_core.autoencoder import AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.errors import DAVAEError
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.training.planning import dit, plan, terms, vae
from davae_core.training.planning.dit import Stage2
from davae_core.training.planning.vae import Stage1
from davae_core.training.tasks import adapter, autoencoder

MODEL = MMDiTConfig(hidden=128, depth=3, grid=16, context=48, pooled=40, dual_attention=(0, 1))
TOY = Stage2(MODEL, tokens=48, text=7, rank=4, bf16=False, recompute=False)
VAE = Stage1(AutoencoderConfig(widths=(32, 32, 64, 64), blocks=1), pixels=64 * 64, bf16=False, perceptual=False)
ROOT = Path(__file__).parents[3]


def adapted(shape: Stage2) -> adapter.AdaptedModel:
    base = MMDiT(shape.model).state_dict()
    model = adapter.AdaptedModel(base, shape.latent, shape.rank, shape.targets, 0)
    if shape.recompute:
        model.checkpoint_blocks()
    return model


def counted(do: Callable[[], Any]) -> int:
    """Operations that PyTorch counts on tensors without memory, where it counts attention as its two products."""
    with FlopCounterMode(display=False) as counter:
        do()
    return int(counter.get_total_flops())


def inputs(shape: Stage2, batch: int = 1) -> tuple[torch.Tensor, ...]:
    m, rows = shape.model, 6
    size = batch, shape.latent.channels, rows * m.patch, shape.tokens // rows * m.patch
    with torch.device("meta"):
        x, text = torch.zeros(size), torch.zeros(batch, shape.text, m.context)
        return x, torch.zeros(batch), text, torch.zeros(batch, m.pooled)


@pytest.mark.parametrize("targets", ["paper", "all"])
@pytest.mark.parametrize("recompute", [False, True])
def test_operations_of_an_adapter_step_are_those_that_pytorch_counts(recompute: bool, targets: str) -> None:
    chosen = TOY.targets if targets == "paper" else tuple(LORA_MODULES)
    shape = replace(TOY, recompute=recompute, targets=chosen)
    model = adapted(shape).to("meta")
    with torch.no_grad():
        forward = counted(lambda: model.mmdit(*inputs(shape)))
    step = counted(lambda: model.mmdit(*inputs(shape)).sum().backward())
    planned = dit.flops(shape)
    assert sum(term.forward for term in planned) == forward
    assert sum(term.step for term in planned) == pytest.approx(step, rel=0.01)


def test_operations_of_an_autoencoder_step_are_those_that_pytorch_counts() -> None:
    with torch.device("meta"):
        model = DAVAE(DAVAEConfig(VAE.base, VAE.latent, base_decoder=True))
        x = torch.zeros(1, 3, 64, 64)
    model.base_encoder.requires_grad_(False)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            z, features = model.encode_base(x), model.base_encoder.features(x)
        detail = model.detail_down(features).chunk(2, dim=1)[0]
        return model.decode(torch.cat([z, detail], dim=1))

    assert counted(forward) == sum(term.forward for term in vae.flops(replace(VAE, recompute=False)))
    step = sum(term.step for term in vae.flops(replace(VAE, recompute=False)))
    assert counted(lambda: forward().sum().backward()) == pytest.approx(step, rel=0.01)
    autoencoder.recompute(autoencoder.trained_blocks(model))
    assert counted(lambda: forward().sum().backward()) == pytest.approx(
        sum(term.step for term in vae.flops(VAE)), rel=0.02
    )


def test_the_arithmetic_of_sd35_medium_is_that_of_the_paper() -> None:
    # One prediction of one image, with 154 text tokens; TFLOP.
    def native(tokens: int) -> float:
        shape = Stage2(latent=LatentSpec(16, 16), tokens=tokens, text=154, rank=0)
        return sum(term.forward for term in dit.flops(shape)) / 1e12

    assert native(1024) == pytest.approx(2.14, rel=0.01)
    assert native(4096) == pytest.approx(10.8, rel=0.01)
    assert native(16384) == pytest.approx(88.3, rel=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_block_keeps_is_what_autograd_saves(bf16: bool) -> None:
    shape = replace(TOY, tokens=192, text=90, bf16=bf16)
    model = adapter.AdaptedModel(
        MMDiT(MODEL).state_dict(),
        shape.latent,
        shape.rank,
        shape.targets,
        0,
        frozen=torch.bfloat16 if bf16 else torch.float32,
    )
    planned = {formula: count for formula, count in dit.saved(shape, 2) if count}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = []
    for block in model.mmdit.joint_blocks:
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            if tensor.ndim >= 3 or tensor.shape[0] == 2 * shape.tokens:  # not the casts of weights
                kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        x, context = torch.randn(2, 192, 128, requires_grad=True), torch.randn(2, 90, 128, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            block(context, x, torch.randn(2, 128))
        found.append(sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights))
    dual, last = found[0], found[-1]
    assert list(planned.values()) == pytest.approx([dual, last], rel=0.04)


DRIVER = """
import json, os, sys

import torch

from davae_core.adapter import PAPER_TARGETS
from davae_core.autoencoder import AutoencoderConfig
from davae_core.davae import DAVAE, DAVAEConfig
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.training.tasks import adapter, autoencoder
from davae_core.training.run import ema, optimiser
from davae_core.training.run.config import OptimiserConfig

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def train(told):
    batch = told["batch"]
    if told["stage"] == 2:
        config = MMDiTConfig(**{**told["model"], "dual_attention": tuple(told["model"]["dual_attention"])})
        with torch.device("meta"):
            names = {name: tensor.shape for name, tensor in MMDiT(config).state_dict().items()}
        base = {name: torch.zeros(shape) for name, shape in names.items()}
        model = adapter.AdaptedModel(base, LatentSpec(), told["rank"], PAPER_TARGETS, 0)
        del base
        if told["recompute"]:
            model.checkpoint_blocks()
        side = int(told["tokens"] ** 0.5) * config.patch
        x, text = torch.randn(batch, 32, side, side), torch.randn(batch, told["text"], config.context)
        run = lambda: model(x, torch.rand(batch), text, torch.randn(batch, config.pooled))
    else:
        base = AutoencoderConfig(**{**told["base"], "widths": tuple(told["base"]["widths"])})
        model = DAVAE(DAVAEConfig(base, LatentSpec(), base_decoder=True))
        model.base_encoder.requires_grad_(False), model.base_decoder.requires_grad_(False)
        if told["recompute"]:
            autoencoder.recompute(autoencoder.trained_blocks(model))
        side = int(told["pixels"] ** 0.5)
        x = torch.rand(batch, 3, side, side)

        def run():
            with torch.no_grad():
                z, features = model.encode_base(x), model.base_encoder.features(x)
            return model.decode(torch.cat([z, model.detail_down(features).chunk(2, dim=1)[0]], dim=1))

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adam, average = optimiser.adamw(parameters, OptimiserConfig()), ema.EMA(parameters, 0.999)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    adam.step()  # moments are there from the first step on
    adam.zero_grad(set_to_none=True)
    run().square().mean().backward()
    adam.step()
    average.update(1)

told = json.loads(sys.argv[1])
small = {"batch": 1, "tokens": 16, "text": 5, "rank": 2, "pixels": 32 * 32}
if told["stage"] == 2:
    small["model"] = told["model"] | {"hidden": 64, "depth": 2, "grid": 8, "dual_attention": (0,)}
train(told | small)  # loads the libraries
before = peak()
train(told)
print(peak() - before)
"""


def measured(stage: int, batch: int, shape: Stage1 | Stage2) -> int:
    """Peak memory of a training step with moments, above that of the process without a model."""
    told = json.dumps({"stage": stage, "batch": batch, **asdict(shape)})
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    command = [sys.executable, "-c", DRIVER, told]
    ended = subprocess.run(command, cwd=ROOT, env=returned, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


MEDIUM = MMDiTConfig(hidden=256, depth=4, grid=48, context=256, pooled=256, dual_attention=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_an_adapter_step_takes_the_memory_that_is_planned(recompute: bool) -> None:
    shape = Stage2(MEDIUM, tokens=576, text=100, rank=32, bf16=False, recompute=recompute)
    planned = terms.peak(dit.memory(shape, 4))
    found = measured(2, 4, shape)
    print(f"planned {planned / 1e6:.0f} MB, measured {found / 1e6:.0f} MB")
    assert found == pytest.approx(planned, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_an_autoencoder_step_takes_the_memory_that_is_planned(recompute: bool) -> None:
    base = AutoencoderConfig(widths=(32, 32, 64, 64), blocks=1)
    shape = Stage1(base, pixels=256 * 256, bf16=False, recompute=recompute, perceptual=False)
    planned = terms.peak(vae.memory(shape, 1))
    found = measured(1, 1, shape)
    print(f"planned {planned / 1e6:.0f} MB, measured {found / 1e6:.0f} MB")
    assert found == pytest.approx(planned, rel=0.2)


def report(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = plan.main(list(args))
    return code, capsys.readouterr().out


def test_the_plan_of_both_stages_is_printed_with_its_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = report(*["--gpus", "8", "--memory", "80", "--images", "100k", "--size", "1024"], capsys=capsys)
    assert code == 0
    assert "sd3_vae_f16: 1024 px, batch 128 = 8 GPUs x 16 images" in said
    assert "sd35m_1024: 1024 px, batch 96 = 8 GPUs x 12 images" in said
    for formula in (
        "24 h^2 T N",
        "4 (T + L)^2 h",
        "4 weight + 4 gradient + 8 moments + 4 average",
        "a pass over 100,000",
    ):
        assert formula in said


@pytest.mark.parametrize(("recipe", "memory"), [("sd35m_1024", 24), ("sd35m_2048", 24), ("sd3_vae_f16", 24)])
def test_the_recipes_own_micro_batches_fit_24_gb(recipe: str, memory: int, capsys: pytest.CaptureFixture[str]) -> None:
    known = {**plan.STAGES["adapter"].recipes, **plan.STAGES["autoencoder"].recipes}
    micro = known[recipe][1].run.micro_batch
    args = f"--gpus 1 --memory {memory} --recipe {recipe} --micro-batch {micro}"
    assert report(*args.split(), capsys=capsys)[0] == 0
    code, said = report(*args.replace(f"--memory {memory}", "--memory 5").split(), capsys=capsys)
    assert code == 1 and "does NOT fit" in said


def test_more_memory_takes_more_images_at_once() -> None:
    recipe = plan.STAGES["adapter"].recipes["sd35m_1024"][1]
    small, large = (plan.plan("r", recipe, plan.PlanConfig(gpus=8, memory=memory)) for memory in (24, 80))
    assert small.fits and small.micro_batch < large.micro_batch == 12


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--gpus 7", "batch of 128 .* cannot be divided among 7 GPUs"),
        ("--recipe sd4", "no recipe 'sd4' to plan; choose one of sd35m_1024"),
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
