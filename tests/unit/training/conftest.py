"""Real trainings of toy models on generated images: a few steps each, through the scripts' own main functions."""

import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from davae_core import tiny
from davae_core.checkpoints import files
from davae_core.training import stages as entry
from davae_core.training.run import launch, state

STAGES = ("base_autoencoder", "base_dit", "autoencoder", "adapter", "steps", "predictor")
MAINS = {stage: partial(entry.run, stage) for stage in STAGES}
Curves = dict[str, dict[int, float]]
SIZES = {"base_autoencoder": 16, "base_dit": 16, "autoencoder": 32, "adapter": 32, "steps": 32, "predictor": 32}
EXPORTS = {
    "base_autoencoder": [tiny.BASE_AUTOENCODER],
    "base_dit": [tiny.MODEL, tiny.TEXT_ENCODER],
    "autoencoder": [tiny.AUTOENCODER],
    "adapter": [tiny.ADAPTER],
    "steps": [tiny.FEW_STEPS],
    "predictor": [tiny.PREDICTOR],
}


def read_curves(out: Path) -> Curves:
    """What TensorBoard shows of the run in a folder: values by curve and step."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(out), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="session")
def curves() -> Callable[[Path], Curves]:
    """``curves(folder)``: what TensorBoard shows of a run, by curve and step."""
    return read_curves


@pytest.fixture(autouse=True)
def with_gradients(repeatable: None) -> Iterator[None]:
    """The other unit tests run without autograd; these train."""
    with torch.enable_grad():
        yield


@pytest.fixture(autouse=True)
def a_lock_of_its_own() -> Iterator[None]:
    """A run that is ended in the middle of a line keeps tqdm's lock, which other tests' threads would wait for."""
    yield
    tqdm.set_lock(TqdmDefaultWriteLock())


@pytest.fixture(scope="session", autouse=True)
def as_from_a_terminal() -> Iterator[None]:
    """A suite that nohup started ignores SIGHUP, and so would every run in it, as it should."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session", autouse=True)
def short_survey() -> Iterator[None]:
    """Statistics of 32 images instead of 1024, which would take longer than all steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "SURVEY_STEPS", 2)
        yield


@dataclass
class Stages:
    """The scripts at toy size, each reading what the one before it left in ``root``."""

    root: Path
    images: Path
    main = MAINS
    exports = EXPORTS
    sizes = SIZES
    names: tuple[str, ...] = field(default=tuple(MAINS))

    def folder(self, stage: str) -> Path:
        return self.root / stage

    def file(self, stage: str, number: int = 0) -> Path:
        return self.folder(stage) / EXPORTS[stage][number]

    def options(self, stage: str) -> list[str]:
        """What makes the recipe ``micro`` small."""
        model = "--model.hidden 64 --model.depth 2 --model.grid 8 --model.context 24 --model.pooled 16"
        base, diffusion, text = self.file("base_autoencoder"), self.file("base_dit"), self.file("base_dit", 1)
        own = {
            "base_autoencoder": "--model.widths 32 32 32 64",
            "base_dit": f"{model} --model.dual-attention 0 --autoencoder {base}",
            "autoencoder": f"--base {base} --losses.l1 2 --losses.perceptual 0 --losses.kl 1e-7 --alignment.weight 0.2",
            "adapter": f"--model {diffusion} --text-encoder {text} --autoencoder {self.file('autoencoder')} --rank 4 "
            "--detail-warmup 4 --recommended.steps 3 --recommended.size 0",
            "steps": f"--model {diffusion} --text-encoder {text} --autoencoder {self.file('autoencoder')} "
            f"--adapter {self.file('adapter')} --rank 4 --steps 2 --substeps 2 --cfg 3",
            "predictor": f"--autoencoder {self.file('autoencoder')} --width 64 --blocks 1",
        }
        return own[stage].split()

    def command(self, stage: str, out: Path, steps: int, *more: str) -> list[str]:
        """The arguments of a script; ``more`` wins over what is set here."""
        common = f"micro --data.images {self.images} --data.size {SIZES[stage]} --run.out {out} --run.steps {steps}"
        common += " --run.batch 4 --run.log-every 1 --run.sample-every 0 --optimiser.warmup 2 --optimiser.lr 1e-3"
        return [*common.split(), *self.options(stage), *more]

    def run(self, stage: str, out: Path, steps: int, *more: str) -> int:
        """Train in this process; the exit code."""
        return MAINS[stage](self.command(stage, out, steps, *more))

    def curves(self, out: Path) -> Curves:
        """What TensorBoard shows of a run."""
        return read_curves(out)

    def weights(self, out: Path) -> dict[str, torch.Tensor]:
        """All that the state of a run holds: weights, averages, moments."""
        return state.load(out).tensors

    def exported(self, stage: str, out: Path) -> dict[str, torch.Tensor]:
        """All tensors of the finished files."""
        return {f"{name}/{key}": t for name in EXPORTS[stage] for key, t in files.read(out / name)[0].items()}


def draw_images(folder: Path, count: int, size: int) -> None:
    """Captioned pictures of waves, each of its own colours and lengths."""
    folder.mkdir()
    y, x = np.mgrid[0:size, 0:size] / size
    for i in range(count):
        waves = [np.sin(7 * x * (i + 1) + i), np.cos(5 * y * (i % 3 + 1)), np.sin(9 * x * y + 2 * i)]
        pixels = np.stack(waves, axis=-1) * 120 + 128
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{['flat', 'round'][i % 2]} wave {i}")


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, short_survey: None) -> Stages:
    """All scripts, after two steps of each (a smoke run): their files are there for further runs."""
    root = tmp_path_factory.mktemp("stages")
    draw_images(root / "images", count=8, size=32)
    stages = Stages(root, root / "images")
    for stage in stages.names:
        assert stages.run(stage, stages.folder(stage), 2) == 0
    return stages
