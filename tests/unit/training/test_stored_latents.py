"""Latents on disk are those that the DA-VAE gives, and a training on them needs no DA-VAE."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints
from davae_core.davae import DAVAE
from davae_core.errors import DAVAEError
from davae_core.training.data import dataset, stored_latents
from davae_core.training.data.stored_latents import LatentsConfig, load_latents


@pytest.fixture
def autoencoder(stages: Any) -> Path:
    """The file of a toy DA-VAE."""
    return stages.file("autoencoder")


def make(stages: Any, out: Path, *more: str) -> int:
    command = (
        f"--data.images {stages.images} --data.size 32 --data.workers 0 --autoencoder {stages.file('autoencoder')}"
    )
    return stored_latents.main([*command.split(), "--out", str(out), "--shard", "6", *more])


def test_every_image_a_training_sees_has_its_latent(stages: Any, autoencoder: Path, tmp_path: Path) -> None:
    assert make(stages, tmp_path, "--dtype", "fp32") == 0
    stored, davae = load_latents(tmp_path, autoencoder), checkpoints.load_autoencoder(autoencoder, torch.float32)
    config = dataset.DataConfig((str(stages.images),), size=32, workers=0)
    mirrored = set()
    for batch in dataset.loader(config, batch=4, seed=5, multiple=32, steps=4):
        with torch.no_grad():
            z = davae.latent.normalise(davae.encode(batch["image"]).float())
        torch.testing.assert_close(stored(batch["image"]), z, atol=1e-4, rtol=1e-4)
        mirrored |= {
            (name, image.sum(dim=0).argmax().item()) for name, image in zip(batch["name"], batch["image"], strict=True)
        }
    assert len(mirrored) > len({name for name, _ in mirrored}) == 8  # both ways round were seen


def test_a_training_on_stored_latents_does_not_encode(
    stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(stages, tmp_path / "latents", "--dtype", "fp32")
    fp32 = ("--run.precision", "fp32")  # what is stored was encoded without autocast
    assert stages.run("adapter", tmp_path / "with_davae", 2, *fp32) == 0
    encoded: list[int] = []
    encode = DAVAE.encode
    monkeypatch.setattr(DAVAE, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    assert stages.run("adapter", tmp_path / "stored", 2, *fp32, "--latents", str(tmp_path / "latents")) == 0
    assert encoded == [4]  # the sheet at the end
    curves = [stages.curves(tmp_path / name) for name in ("with_davae", "stored")]
    for tag in ("adapter/loss", "adapter/base"):
        assert curves[1][tag] == pytest.approx(curves[0][tag], rel=1e-4)


def test_only_what_is_missing_is_encoded(stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(stages, tmp_path)
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "shard_000001.safetensors").unlink()
    encoded: list[int] = []
    encode = DAVAE.encode
    monkeypatch.setattr(DAVAE, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    make(stages, tmp_path)
    assert encoded == [1] * 6 and (tmp_path / "index.json").read_text() == index


def test_a_broken_image_is_named_and_left_out(stages: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "images"
    shutil.copytree(stages.images, images)
    (images / "3.png").write_bytes(b"no image")
    with caplog.at_level("WARNING"):
        make(stages, tmp_path / "out", "--data.images", str(images), "--data.no-flip")
    assert "3.png: it has no latent" in caplog.text
    assert len(load_latents(tmp_path / "out", stages.file("autoencoder")).kept) == 7


def test_what_does_not_fit_is_refused(stages: Any, autoencoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"cropped at random.*--data.random-crop"):
        LatentsConfig(dataset.DataConfig((str(stages.images),), random_crop=True), autoencoder, tmp_path)
    make(stages, tmp_path, "--data.no-flip")
    with pytest.raises(DAVAEError, match=r"no latent of 2 of 2 images.*run python -m davae_core.training latents"):
        load_latents(tmp_path, autoencoder)(torch.zeros(2, 3, 32, 32))
    with pytest.raises(DAVAEError, match="not of the DA-VAE"):
        load_latents(tmp_path, stages.file("base_autoencoder"))
