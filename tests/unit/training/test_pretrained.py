"""Base models out of the files people have."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae_core import bases, checkpoints, tiny
from davae_core.adapter import Recommended
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import files, metadata
from davae_core.checkpoints.diffusers_names import transformer_rules, vae_rules
from davae_core.checkpoints.names import from_native
from davae_core.checkpoints.tensors import Tensors, in_memory
from davae_core.errors import CheckpointError
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT
from davae_core.training import pretrained

VAE = AutoencoderConfig(widths=(32, 32), blocks=1)


@pytest.fixture
def checkpoint(make_mmdit: Callable[..., MMDiT], tmp_path: Path) -> Path:
    """A whole checkpoint: diffusion model, VAE, a text encoder."""
    state = {f"model.diffusion_model.{name}": t for name, t in make_mmdit().state_dict().items()}
    state |= {f"first_stage_model.{name}": t for name, t in Autoencoder(VAE).state_dict().items()}
    state["text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight"] = torch.zeros(4, 4)
    files.save(tmp_path / "sd3.5.safetensors", state, {})
    return tmp_path / "sd3.5.safetensors"


def test_the_diffusion_model_of_a_checkpoint_is_the_one_of_its_own_file(checkpoint: Path, tmp_path: Path) -> None:
    inside = pretrained.diffusion_model(checkpoint)
    files.save(tmp_path / "alone.safetensors", inside, {})
    alone = pretrained.diffusion_model(tmp_path / "alone.safetensors")
    assert "x_embedder.proj.weight" in inside
    assert inside.keys() == alone.keys() and all(torch.equal(inside[name], alone[name]) for name in inside)


def test_the_diffusion_model_of_a_diffusers_folder_is_in_the_layouts_own_names(mmdit: MMDiT, tmp_path: Path) -> None:
    native = mmdit.state_dict()
    theirs = from_native(in_memory(native), transformer_rules(mmdit.config))
    (tmp_path / "transformer").mkdir()
    files.save(tmp_path / "transformer/diffusion_pytorch_model.safetensors", dict(theirs), {})
    assert theirs.keys() != native.keys()
    for folder in (tmp_path, tmp_path / "transformer"):
        found = pretrained.diffusion_model(folder)
        assert found.keys() == native.keys() and all(torch.equal(found[name], native[name]) for name in native)


def test_the_vae_of_a_checkpoint_loads_and_nothing_else_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    getitem = Tensors.__getitem__

    def noted(self: Tensors, name: str) -> torch.Tensor:
        read.append(name)
        return getitem(self, name)

    monkeypatch.setattr(Tensors, "__getitem__", noted)
    assert pretrained.base_vae(checkpoint).config == VAE
    assert read and not any("diffusion_model" in name for name in read)


def test_the_vae_of_a_diffusers_folder_loads(tmp_path: Path) -> None:
    native = Autoencoder(VAE).state_dict()
    (tmp_path / "vae").mkdir()
    theirs = from_native(in_memory(native), vae_rules(VAE))
    files.save(tmp_path / "vae/diffusion_pytorch_model.safetensors", dict(theirs), {})
    found = pretrained.base_vae(tmp_path).state_dict()
    assert found.keys() == native.keys() and all(torch.equal(found[name], native[name]) for name in native)


def test_the_base_vae_of_a_da_vae_is_taken_out_of_it() -> None:
    path = tiny.FOLDERS["vae"] / tiny.AUTOENCODER
    davae, base = checkpoints.load_autoencoder(path, torch.float32), pretrained.base_vae(path)
    assert davae.base_decoder is not None
    for part, theirs in ((base.encoder, davae.base_encoder), (base.decoder, davae.base_decoder)):
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())
    assert pretrained.base_of_file(path, base.config).name == "sd3"
    assert pretrained.diffusion_model(tiny.FOLDERS["diffusion_models"] / tiny.MODEL)["pos_embed"].ndim == 3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_da_vae_says_by_its_units_whose_base_it_holds(family: str, tmp_path: Path) -> None:
    shift, scale = bases.BASES[family].normalisation or (0.0, 0.0)
    latent = LatentSpec(4, 4, base_shift=shift, base_scale=scale)
    told = metadata.build("autoencoder", metadata.latent_config(latent, Recommended()), title="")
    files.save(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, told)
    config = AutoencoderConfig(latent_channels=4, quant_conv=True)
    assert pretrained.base_of_file(tmp_path / "x.safetensors", config).name == family


def test_a_da_vae_without_its_base_decoder_is_named(tmp_path: Path) -> None:
    tensors, told = files.read(tiny.FOLDERS["vae"] / tiny.AUTOENCODER)
    files.save(tmp_path / "x.safetensors", {n: t for n, t in tensors.items() if "base_decoder" not in n}, told)
    with pytest.raises(CheckpointError, match="saved without its base VAE's decoder"):
        pretrained.base_vae(tmp_path / "x.safetensors")


def test_what_is_no_base_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a DA-VAE adapter; give an unadapted SD3"):
        pretrained.diffusion_model(tiny.FOLDERS["loras"] / tiny.ADAPTER)
    with pytest.raises(CheckpointError, match="holds no VAE that a DA-VAE can be made on"):
        pretrained.base_vae(tiny.FOLDERS["loras"] / tiny.ADAPTER)
