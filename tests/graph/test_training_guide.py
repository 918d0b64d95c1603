"""docs/TRAINING.md, from raw images to a picture in ComfyUI: every command as written, at a tiny scale.

The commands run in a folder where everything they name is there, only small, with options at the end that make each
training two steps on images of 64 px. The gate runs the programs in forked processes, and only reads the settings of
those for several GPUs; with --all a shell runs each block as it stands.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image

from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import files
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.training import stages
from davae_core.training.data.stored_latents import LatentsConfig
from davae_core.training.planning.plan import PlanConfig
from davae_core.training.residual import ResidualConfig
from davae_core.training.run.config import from_command_line
from davae_core.training.text.encode import TextConfig
from harness import sd35, warm
from harness.graph import Graph
from harness.headless import HeadlessComfy
from harness.locate import REPOSITORY, ComfyUI

GUIDE = REPOSITORY / "docs" / "TRAINING.md"
STEPS = "--data.size {size} --data.workers 0 --run.steps 2 --run.batch 2 --run.micro-batch 1 --run.precision fp32"
ADAPTER = f"{STEPS} --frozen fp32 --rank 4 --recommended.steps 2"
OWN = "--data.size 64 --run.steps 1 --run.batch 2"
SMALL = {  # what is added to each command, by its module and recipe
    "davae_core.training autoencoder sd3_vae_f16_redrawn": f"{STEPS.format(size=64)} --redraw.frozen fp32",
    "davae_core.training autoencoder sd3_vae_f16": STEPS.format(size=64),
    "davae_core.training adapter sd35m_1024": ADAPTER.format(size=64),
    "davae_core.training adapter sd35m_2048": ADAPTER.format(size=128),
    "davae_core.training steps sd35m_fast": f"{STEPS.format(size=128)} --frozen fp32 --rank 4 --steps 2 --substeps 1",
    "davae_core.training latents": "--data.size 64",
    "davae_core.training residual": "--data.size 64",
    "davae_core.training predictor sd3_predictor": STEPS.format(size=64),
    "davae_core.training autoencoder flux_vae_f16": STEPS.format(size=64),
    "davae_core.training predictor flux_predictor": STEPS.format(size=64),
    "davae_core.training tiny_decoder sd3_tiny_decoder": STEPS.format(size=64),
    "davae_core.training autoencoder micro": f"{OWN} --losses.perceptual 0",
    "davae_core.training adapter micro": f"{OWN} --rank 4 --recommended.steps 2 --recommended.size 0",
}
PYTHON = f"""#!{sys.executable}
import os, sys
small = {SMALL!r}
arguments = sys.argv[1:]
for command, more in small.items():
    if " ".join(arguments[1:]).startswith(command):
        arguments += more.split()
os.execv(sys.executable, [sys.executable, *arguments])
"""
ACCELERATE = f"""#!{sys.executable}
import os, sys
small = {SMALL!r}
at = sys.argv.index("-m")
before, module, after = sys.argv[2:at], sys.argv[at + 1], sys.argv[at + 2:]
before += "--num_machines 1 --num_processes 2 --main_process_ip 127.0.0.1".split()
before += ["--main_process_port", os.environ["FREE_PORT"]]
after += small[" ".join([module, *after[:2]])].split()
os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.launch", *before, "-m", module, *after])
"""
TOOLS = {"text": TextConfig, "latents": LatentsConfig, "residual": ResidualConfig, "plan": PlanConfig}
ALONE = {"CUDA_VISIBLE_DEVICES": ""}
PIP = f"""#!{sys.executable}
import importlib.metadata, sys
for name in sys.argv[2:]:
    if not name.startswith("-"):
        importlib.metadata.version(name.split("==")[0])
"""


def blocks() -> list[str]:
    """The commands of the guide, in order; those of an indented block belong together. The map of folders is none."""
    indented = re.findall(r"(?:^ {4}.*\n)+", GUIDE.read_text(encoding="utf-8"), re.M)
    return [block.strip("\n") for block in indented if not block.startswith("    davae_core/")]


@pytest.fixture
def place(base: Path, comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the root of the repository, with what a person has to bring."""
    place = tmp_path_factory.mktemp("guide")
    (place / "davae_core").symlink_to(REPOSITORY / "davae_core")
    (place / "ComfyUI").mkdir()
    (place / "ComfyUI" / "comfy").symlink_to(comfyui.root / "comfy")
    (place / "ComfyUI" / "models").symlink_to(base / "models")
    (place / "photos").mkdir()
    torch.manual_seed(0)
    for number, caption in enumerate(("a red square", "a grey cat (large)", "noise")):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((160, 160)).save(place / "photos" / f"{number}.png")
        (place / "photos" / f"{number}.txt").write_text(caption, encoding="utf-8")
    models = {
        "model.diffusion_model.": MMDiT(MMDiTConfig(hidden=128, depth=2, grid=32, dual_attention=(0,))),
        "first_stage_model.": Autoencoder(AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1)),
    }
    state = {prefix + name: t.half() for prefix, model in models.items() for name, t in model.state_dict().items()}
    files.save(place / sd35.CHECKPOINT, state, {})
    files.save(place / "ae.safetensors", models["first_stage_model."].state_dict(), {})
    encoders = {sd35.CLIP_L: sd35.clip_state(768), sd35.CLIP_G: sd35.clip_state(1280), sd35.T5: sd35.t5_state()}
    for name, encoder in encoders.items():
        files.save(place / name, {key: tensor.half() for key, tensor in encoder.items()}, {})
    return place


def forked(block: str, place: Path) -> None:
    """A block of the guide, its programs forked from one that has torch imported; those for several GPUs only read."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"]:
            done = warm.run(words[2], *words[3:], *smaller(words[2:]), environment=ALONE, folder=place)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        elif words[0] == "accelerate":
            module, name, *settings = words[words.index("-m") + 1 :]
            assert module == "davae_core.training"
            assert (place / words[words.index("--config_file") + 1]).is_file()
            from_command_line(stages.STAGES[name].recipes, "", [*settings, *smaller([module, name, *settings])])
        elif words[0] != "pip":
            subprocess.run(words, cwd=place, check=True)


def read(block: str, place: Path) -> None:
    """A block of the guide, its settings read; the trainings on a laptop run, and what they leave is copied."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"] and "micro" in words:
            forked(line, place)
        elif "davae_core.training" in words:
            name, *settings = words[words.index("davae_core.training") + 1 :]
            if name in stages.STAGES:
                from_command_line(stages.STAGES[name].recipes, "", settings)
            elif name in TOOLS:
                tyro.cli(TOOLS[name], args=settings)
            else:
                assert name == "export" and len(settings) == 1, line
        elif words[0] == "cp" and all((place / source).exists() for source in words[1:-1]):
            subprocess.run(words, cwd=place, check=True)


def smaller(words: list[str]) -> list[str]:
    """What is added to a command to make it small."""
    return next((more.split() for start, more in SMALL.items() if " ".join(words).startswith(start)), [])


def in_a_shell(command: str, place: Path) -> None:
    """A block of the guide as it stands."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = place / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {"python": PYTHON, "accelerate": ACCELERATE, "pip": PIP}.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(stat.S_IRWXU)
    environment = (
        os.environ
        | ALONE
        | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(place),
            "FREE_PORT": str(port),
        }
    )
    done = subprocess.run(["bash", "-ec", command], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("run", [read, *(pytest.param(run, marks=pytest.mark.slow) for run in (forked, in_a_shell))])
def test_every_command_of_the_guide_runs_and_what_it_makes_draws_a_picture(
    place: Path, comfy: HeadlessComfy, run: Callable[[str, Path], None]
) -> None:
    for kind in ("vae", "loras", "diffusion_models"):
        (comfy.base / "models" / kind).mkdir(exist_ok=True)
    for block in blocks():
        run(block, place)
    shutil.copy(place / sd35.CHECKPOINT, comfy.base / "models" / "diffusion_models")
    for size in (1024, 2048) if run is not read else ():
        image = drawn(comfy, sd35.DAVAE, f"sd35m_davae_{size}.safetensors")
        assert image.shape == (1, 64, 64, 3) and image.isfinite().all() and image.std() > 1e-3
    image = drawn(comfy, "own_davae.safetensors", "own_adapter.safetensors", tiny=True)
    assert image.shape == (1, 64, 64, 3) and image.isfinite().all() and image.std() > 1e-3


def drawn(comfy: HeadlessComfy, davae_name: str, adapter: str, tiny: bool = False) -> torch.Tensor:
    """A picture by what the trainings have left."""
    g = Graph()
    davae = g.node("DAVAE_Loader", davae_name=davae_name, dtype="auto")
    if tiny:
        base = g.node("DAVAE_TinySD35")
        texts = [g.node("CLIPTextEncode", clip=base[1], text=text) for text in ("a red cat", "")]
    else:
        base = g.node("UNETLoader", unet_name=sd35.CHECKPOINT, weight_dtype="default")
        texts = [g.node("HarnessConditioning", context=4096, pooled=2048, seed=seed) for seed in (1, 2)]
    adapted = g.node("DAVAE_Adapter", model=base, adapter_name=adapter, strength=1.0)
    latent = g.node("DAVAE_EmptyLatent", width=64, height=64, batch_size=1)
    sampled = g.node(
        "KSampler", model=adapted, positive=texts[0], negative=texts[1], latent_image=latent, seed=1, steps=2, cfg=2.0,
        sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    g.node(
        "HarnessCapture",
        value=g.node("DAVAE_DetailDecode", samples=sampled, davae=davae[2], detail_strength=1.0),
        key="image",
    )
    return comfy.run(g.prompt).captured["image"]
