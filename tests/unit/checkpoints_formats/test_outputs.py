"""What the commands may replace, what they may be given to write, and what they refuse before they work."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae_core.adapter import zero_adapter
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import files, save_adapter, save_autoencoder
from davae_core.checkpoints import merge as merging
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError, WriteError
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT

VAE = AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1)


@pytest.fixture
def vae_file(tmp_path: Path) -> Path:
    files.save(tmp_path / "vae.safetensors", Autoencoder(VAE).state_dict(), {})
    return tmp_path / "vae.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path, make_mmdit: Callable[..., MMDiT]) -> Path:
    state = {f"model.diffusion_model.{name}": t for name, t in make_mmdit(depth=1, grid=4).state_dict().items()}
    state |= {f"first_stage_model.{name}": t for name, t in Autoencoder(VAE).state_dict().items()}
    state["text_encoders.clip_l.transformer.x"] = torch.ones(2)
    files.save(tmp_path / "sd35.safetensors", state, {})
    return tmp_path / "sd35.safetensors"


@pytest.mark.parametrize("way", ["name", "folder", "symbolic", "hard", "shards"])
def test_a_source_is_never_replaced(tmp_path: Path, run, vae_file: Path, way: str) -> None:
    source, target = vae_file, tmp_path / "link.safetensors"
    if way == "shards":
        index = '{"weight_map": {"decoder.conv_in.weight": "vae.safetensors"}}'
        source, target = tmp_path / "v.safetensors.index.json", vae_file
        source.write_text(index)
    elif way in ("symbolic", "hard"):
        (os.symlink if way == "symbolic" else os.link)(vae_file, target)
    else:
        target = {"name": vae_file, "folder": tmp_path}[way]
    before = vae_file.read_bytes()
    with pytest.raises(WriteError, match=r"would replace .*vae\.safetensors, which is read here"):
        run(source, target, "--overwrite")
    assert vae_file.read_bytes() == before


def test_other_files_are_replaced_when_it_is_said_so(tmp_path: Path, run, checkpoint: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    files.save(folder / "clip_l.safetensors", {"mine": torch.ones(3)}, {})
    with pytest.raises(WriteError, match=r"clip_l\.safetensors is there already; .*--overwrite"):
        run(checkpoint, folder)
    assert [path.name for path in folder.iterdir()] == ["clip_l.safetensors"]
    assert list(files.read(folder / "clip_l.safetensors")[0]) == ["mine"]
    assert len(run(checkpoint, folder, "--overwrite")) == 3
    assert list(files.read(folder / "clip_l.safetensors")[0]) == ["x"]
    (folder / "x.safetensors").mkdir()
    with pytest.raises(WriteError, match="is a folder, expected the name of a file"):
        run(checkpoint, folder / "x.safetensors", "--part", "vae", "--overwrite")


def test_a_pipelines_own_files_are_never_replaced(tmp_path: Path, run, vae_file: Path) -> None:
    run(vae_file, tmp_path / "d", "--to", "diffusers")
    with pytest.raises(WriteError, match="which is read here"):
        run(tmp_path / "d", tmp_path / "d" / "vae" / "diffusion_pytorch_model.safetensors", "--overwrite")


def test_merging_replaces_neither_its_sources_nor_other_files(tmp_path: Path, make_mmdit: Callable[..., MMDiT]) -> None:
    model = make_mmdit(depth=1, grid=4)
    base, adapter, out = (tmp_path / f"{name}.safetensors" for name in ("base", "adapter", "out"))
    files.save(base, model.state_dict(), {})
    save_adapter(adapter, zero_adapter(model.config, LatentSpec(), rank=2))
    before = base.read_bytes(), adapter.read_bytes()
    for source in (base, adapter):
        with pytest.raises(WriteError, match="which is read here"):
            merging.main([str(base), str(adapter), str(source), "--overwrite"])
    assert (base.read_bytes(), adapter.read_bytes()) == before
    files.save(out, {"mine": torch.ones(3)}, {})
    with pytest.raises(WriteError, match="is there already"):
        merging.main([str(base), str(adapter), str(out)])
    assert list(files.read(out)[0]) == ["mine"]
    merging.main([str(base), str(adapter), str(out), "--overwrite"])
    assert "mine" not in files.read(out)[0]
    merging.main([str(base), str(adapter), str(tmp_path / "out.sft")])
    assert (tmp_path / "out.sft").is_file()


def test_a_text_encoder_cannot_be_written_for_diffusers(tmp_path: Path, run, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"clip_l cannot be .* --part diffusion_model or --part vae"):
        run(checkpoint, tmp_path / "d", "--to", "diffusers", "--part", "clip_l")
    assert not (tmp_path / "d").exists()


def test_sft_is_a_file_as_safetensors_is(tmp_path: Path, run, vae_file: Path) -> None:
    (written,) = run(vae_file, tmp_path / "out.sft")
    assert written == tmp_path / "out.sft" and written.is_file()


def test_a_folder_with_one_native_file_is_that_file(tmp_path: Path, run, make_davae: Callable[..., DAVAE]) -> None:
    (tmp_path / "folder").mkdir()
    save_autoencoder(tmp_path / "folder" / "a.safetensors", make_davae(base_decoder=True))
    run(tmp_path / "folder", tmp_path / "d", "--to", "diffusers")
    assert (tmp_path / "d" / "davae.json").is_file()


@pytest.mark.parametrize(("name", "value"), [("shift", "1000"), ("steps", "-3"), ("cfg", "nan"), ("size", "99999")])
def test_settings_that_no_file_may_carry_are_refused(
    tmp_path: Path, run, vae_file: Path, name: str, value: str
) -> None:
    with pytest.raises(CheckpointError, match=f"--{name} is .*, expected a (whole )?number from 0"):
        run(vae_file, tmp_path / "x.safetensors", f"--{name}", value)
    assert not (tmp_path / "x.safetensors").exists()
