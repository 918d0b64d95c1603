"""The command that puts a predictor inside a DA-VAE, and what is trained on its latents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints, tiny
from davae_core.checkpoints import files
from davae_core.davae import PREDICTOR
from davae_core.errors import DAVAEError, LatentError
from davae_core.latent import LatentSpec
from davae_core.predictor import DetailPredictor, PredictorConfig
from davae_core.training import __main__ as entry
from davae_core.training import residual
from davae_core.training import stages as known
from davae_core.training.data.config import DataConfig

NAME = "residual.safetensors"


def train_predictor(stages: Any, out: Path, autoencoder: Path, steps: int = 60) -> Path:
    common = f"micro --data.images {stages.images} --data.size 32 --run.out {out} --run.steps {steps} --run.batch 4"
    common += (
        " --run.sample-every 0 --optimiser.warmup 0 --optimiser.ema 0 --width 64 --blocks 1 --base-noise 0 --no-vary"
    )
    given = f"--autoencoder {autoencoder} --run.precision fp32"
    assert known.run("predictor", [*common.split(), *given.split()]) == 0
    return out / tiny.PREDICTOR


@pytest.fixture(scope="module")
def predictor(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a predictor of the toy DA-VAE that has learned something."""
    with torch.enable_grad():
        return train_predictor(stages, tmp_path_factory.mktemp("predictor"), stages.file("autoencoder"))


@pytest.fixture(scope="module")
def made(stages: Any, predictor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy DA-VAE with it inside, by the command."""
    out = tmp_path_factory.mktemp("residual") / NAME
    command = f"residual --autoencoder {stages.file('autoencoder')} --predictor {predictor} --out {out}"
    assert entry.main([*command.split(), "--data.images", str(stages.images), "--data.size", "32"]) == 0
    return out


@torch.no_grad()
def test_its_statistics_are_those_of_what_is_left(stages: Any, predictor: Path, made: Path) -> None:
    plain = checkpoints.load_autoencoder(stages.file("autoencoder"), torch.float32)
    inside = checkpoints.load_autoencoder(made, torch.float32)
    left = torch.tensor(inside.latent.detail_std) / torch.tensor(plain.latent.detail_std)
    assert left.square().mean() < 0.6
    config = DataConfig((str(stages.images),), size=32)
    told = residual.write(residual.ResidualConfig(config, stages.file("autoencoder"), predictor, made))
    assert told.left == pytest.approx(float(left.square().mean()), rel=1e-3) and told.left <= told.largest
    assert inside.latent.base_scale == plain.latent.base_scale


def test_what_does_not_belong_together_is_refused(stages: Any, predictor: Path, made: Path, tmp_path: Path) -> None:
    config = DataConfig((str(stages.images),), size=32)
    with pytest.raises(DAVAEError, match=r"was trained on .*, this is another .*; give the DA-VAE that it was trained"):
        residual.write(residual.ResidualConfig(config, made, predictor, tmp_path / NAME))
    other = DetailPredictor(PredictorConfig(LatentSpec(detail_channels=32), width=32, blocks=1))
    checkpoints.save_predictor(tmp_path / "other.safetensors", other)
    with pytest.raises(LatentError, match=r"other\.safetensors predicts the detail of latents of 16 \+ 32 channels"):
        asked = residual.ResidualConfig(config, stages.file("autoencoder"), tmp_path / "other.safetensors", made)
        residual.write(asked)
    state, _ = files.read(predictor)
    wild = checkpoints.load_predictor(predictor, torch.float32)
    wild.load_state_dict(state | {"conv_out.bias": state["conv_out.bias"] + torch.randn(16)})
    torch.nn.init.normal_(wild.conv_out.weight, std=1.0)
    checkpoints.save_predictor(tmp_path / "wild.safetensors", wild)
    with pytest.raises(DAVAEError, match=r"leaves .* of the detail's variance in these images"):
        residual.write(
            residual.ResidualConfig(config, stages.file("autoencoder"), tmp_path / "wild.safetensors", tmp_path / NAME)
        )
    assert not (tmp_path / NAME).exists()
    with pytest.raises(DAVAEError, match="has a predictor inside: its latent holds what that does not expect"):
        train_predictor(stages, tmp_path / "second", made, steps=1)


@pytest.mark.parametrize("more", [(), ("--freeze-detail", "--alignment.weight", "0", "--latent-noise", "0.5")])
def test_stage_1_goes_on_from_it_and_leaves_the_predictor_alone(
    stages: Any, made: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    assert stages.run("autoencoder", tmp_path, 3, "--start", str(made), *more) == 0
    before, _ = files.read(made)
    after, _ = files.read(tmp_path / tiny.AUTOENCODER)
    assert before.keys() == after.keys()
    inner = [name for name in before if name.startswith(PREDICTOR)]
    assert inner and all(torch.equal(before[name], after[name]) for name in inner)
    assert not torch.equal(before["joint_up.conv.weight"], after["joint_up.conv.weight"])
    assert bool(more) == torch.equal(before["detail_down.conv.weight"], after["detail_down.conv.weight"])


def test_the_decoder_is_given_the_detail_as_the_encoder_made_it(stages: Any, made: Path, tmp_path: Path) -> None:
    """The first step's losses are those of the DA-VAE without a predictor: taken off, and added again."""
    alike = ("--detail-dropout", "0", "--optimiser.warmup", "0", "--run.precision", "fp32")
    for name, start in (("plain", stages.file("autoencoder")), ("inside", made)):
        assert stages.run("autoencoder", tmp_path / name, 1, "--start", str(start), *alike) == 0
    plain, inside = (stages.curves(tmp_path / name)["autoencoder/l1"][1] for name in ("plain", "inside"))
    assert inside == pytest.approx(plain, rel=1e-4)


def test_an_adapter_is_trained_on_it_and_says_so(stages: Any, made: Path, tmp_path: Path) -> None:
    assert stages.run("adapter", tmp_path, 2, "--autoencoder", str(made)) == 0
    adapter = checkpoints.load_adapter(tmp_path / tiny.ADAPTER)
    assert adapter.config.latent == checkpoints.load_autoencoder(made).latent
    assert adapter.history is not None and "predictor.conv_out.bias" in adapter.history.of["davae"].values


def test_the_bench_compares_it(stages: Any, predictor: Path, tmp_path: Path) -> None:
    for part in ("train", "held_out"):
        (tmp_path / part).symlink_to(stages.images)
    files_of = {
        "model": stages.file("base_dit"),
        "text-encoder": stages.file("base_dit", 1),
        "autoencoder": stages.file("autoencoder"),
        "adapter": stages.file("adapter"),
        "predictor": predictor,
        "images": tmp_path,
        "out": tmp_path / "bench",
    }
    options = [text for name, path in files_of.items() for text in (f"--{name}", str(path))]
    assert entry.main(["ablate", "adapter/residual", "--quick", *options]) == 0
    told = json.loads((tmp_path / "bench" / "table.json").read_text("utf-8"))
    assert set(told) == {"adapter/paper", "adapter/residual"}
    weights = [
        json.loads((tmp_path / "bench" / "adapter" / name / "0.json").read_text())["weights"]["autoencoder"]
        for name in ("paper", "residual")
    ]
    assert weights[0] != weights[1]
