"""Latents on disk are those that the DA-VAE gives, and a training on them needs no DA-VAE."""

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from davae_core import checkpoints, records
from davae_core.davae import DAVAE
from davae_core.errors import DAVAEError
from davae_core.training.data import dataset, stored_latents
from davae_core.training.data.config import DataConfig
from davae_core.training.data.stored_latents import LatentsConfig, load_latents
from davae_core.training.data.survey import collect


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
    config = DataConfig((str(stages.images),), size=32, workers=0)
    mirrored = set()
    images = dataset.loader(config, batch=4, seed=5, multiple=32, steps=4)
    latents = dataset.loader(replace(config, workers=2), batch=4, seed=5, multiple=32, steps=4, latents=stored)
    for batch, given in zip(images, latents, strict=True):
        with torch.no_grad():
            z = davae.latent.normalise(davae.encode(batch["image"]).float())
        torch.testing.assert_close(given["latent"], z, atol=1e-4, rtol=1e-4)
        assert "image" not in given and all(given[key] == batch[key] for key in ("name", "caption", "step", "share"))
        mirrored |= {
            (name, image.sum(dim=0).argmax().item()) for name, image in zip(batch["name"], batch["image"], strict=True)
        }
    assert len(mirrored) > len({name for name, _ in mirrored}) == 8  # both ways round were seen


@pytest.mark.parametrize("workers", [0, 1])
def test_no_picture_is_opened_once_a_training_on_latents_has_begun(
    stages: Any, autoencoder: Path, tmp_path: Path, workers: int
) -> None:
    images = tmp_path / "images"
    shutil.copytree(stages.images, images)
    make(stages, tmp_path / "latents", "--data.images", str(images), "--data.held-out", "20%")
    config = DataConfig((str(images),), size=32, workers=workers, held_out=("20%",))
    found, stored = collect(config, 32), load_latents(tmp_path / "latents", autoencoder)
    found = stored.fitted(found, config)
    given = dataset.loader(config, 4, 0, 32, steps=3, collection=found, latents=stored)
    shutil.rmtree(images)
    assert [batch["latent"].shape[1:] for batch in given] == [torch.Size([32, 2, 2])] * 3
    aside = list(dataset.held_out(config, 32, 4, collection=found, latents=stored))
    assert sum(len(batch["latent"]) for batch in aside) == len(found.held) > 0


def test_latents_are_found_wherever_the_pictures_lie(stages: Any, autoencoder: Path, tmp_path: Path) -> None:
    make(stages, tmp_path / "latents")
    stored, elsewhere = load_latents(tmp_path / "latents", autoencoder), tmp_path / "elsewhere"
    shutil.copytree(stages.images, elsewhere, copy_function=shutil.copyfile)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for path in sorted(elsewhere.iterdir()):
            tar.add(path, path.name)
    for place in (elsewhere, tmp_path / "photos.tar"):
        config = DataConfig((str(place),), size=32)
        assert len(stored.fitted(collect(config, 32), config).sources) == 8


def test_pictures_that_changed_and_new_ones_are_named(stages: Any, autoencoder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(stages.images, images)
    make(stages, tmp_path / "latents", "--data.images", str(images))
    stored, config = load_latents(tmp_path / "latents", autoencoder), DataConfig((str(images),), size=32)
    Image.open(images / "3.png").rotate(90).save(images / "3.png")
    shutil.copy(images / "3.png", images / "new.png")
    aside = images / "aside"
    aside.mkdir()
    Image.new("RGB", (32, 32)).save(aside / "held.png")
    apart = replace(config, held_out=(str(aside),))
    with pytest.raises(DAVAEError, match=r"of 10 images 1 have changed .*; 2 are not in it"):
        stored.fitted(collect(apart, 32), apart)
    shutil.rmtree(aside)
    with pytest.raises(DAVAEError, match=r"of 9 images 1 have changed since.*3\.png; 1 are not in it.*new\.png\. Run"):
        stored.fitted(collect(config, 32), config)
    for other in (replace(config, random_crop=True), replace(config, size=64, enlarge=True)):
        with pytest.raises(DAVAEError, match=r"random-crop|8 have changed since, or are now cut|do not fit"):
            stored.fitted(collect(other, 32), other)


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
    assert not encoded  # the sheet at the end shows decoded latents
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


def test_a_broken_image_is_named_and_left_out(
    stages: Any, autoencoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "images"
    shutil.copytree(stages.images, images)
    (images / "3.png").write_bytes(b"no image")
    (images / "5.png").write_bytes((images / "5.png").read_bytes()[:-300])
    with caplog.at_level("WARNING"):
        make(stages, tmp_path / "out", "--data.images", str(images), "--data.no-flip")
    assert "3.png: it is damaged" in caplog.text and "5.png: image file is truncated; it has no latent" in caplog.text
    stored, config = load_latents(tmp_path / "out", autoencoder), DataConfig((str(images),), size=32, flip=False)
    found = stored.fitted(collect(config, 32), config)
    assert len(stored.kept) == len(found.sources) == 6 and "5.png: image file is truncated" in str(found.table)


def test_what_does_not_fit_is_refused(stages: Any, autoencoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DAVAEError, match=r"cropped at random.*--data.random-crop"):
        LatentsConfig(DataConfig((str(stages.images),), random_crop=True), autoencoder, tmp_path)
    make(stages, tmp_path, "--data.no-flip")
    with pytest.raises(DAVAEError, match="lacks a latent"):
        load_latents(tmp_path, autoencoder)("0" * 32)
    with pytest.raises(DAVAEError, match="not of the DA-VAE"):
        load_latents(tmp_path, stages.file("base_autoencoder"))


def test_latents_of_an_older_version_are_told_from_these(autoencoder: Path, tmp_path: Path) -> None:
    about = {"autoencoder": records.fingerprint([autoencoder]), "dtype": "fp16"}
    records.write(tmp_path, 0, {"00": {"z": torch.zeros(32, 2, 2)}}, stored_latents.KIND, about)
    records.finish(tmp_path, stored_latents.KIND, about)
    with pytest.raises(DAVAEError, match=r"another version, which kept them by the pixels.*anew in another folder"):
        load_latents(tmp_path, autoencoder)


def test_two_commands_do_not_write_into_one_folder(stages: Any, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    with records.claimed(out), pytest.raises(DAVAEError, match=r"another process is at work in .*latents: wait.*--out"):
        make(stages, out)
    assert not out.exists()  # nothing was left in it
    assert make(stages, out) == 0
    assert not (out / records.LOCK).exists()
