"""Sound files as other tools write them, or leave them behind half downloaded, are read; damage in them is told."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file

from davae_core.checkpoints import files, inspect, save_autoencoder
from davae_core.checkpoints.belonging import belonging
from davae_core.checkpoints.opening import open_any
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))


def flip(path: Path) -> None:
    """Change one bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def saved_anew(path: Path) -> None:
    """The same tensors with their hash, as our own commands save them."""
    files.save(path, files.read(path)[0], {"format": "pt"})


def old_name(name: str) -> str:
    for new, old in OLD_NAMES:
        name = name.replace(f"attentions.0{new}", f"attentions.0{old}")
    return name


# The names of others


@pytest.mark.parametrize("convolutions", [False, True])
def test_a_vae_with_the_attention_names_of_earlier_diffusers_is_read(
    tmp_path: Path, run, sd1_kl: AutoencoderKL, convolutions: bool
) -> None:
    """stabilityai/sd-vae-ft-mse and most SD1 folders; some tools write the layers as 1x1 convolutions."""
    state = {old_name(name): tensor for name, tensor in sd1_kl.state_dict().items()}
    if convolutions:
        linear = [name for name in state if "mid_block.attentions.0." in name and state[name].ndim == 2]
        state |= {name: state[name][:, :, None, None].contiguous() for name in linear}
    (tmp_path / "old").mkdir()
    save_file(state, tmp_path / "old" / WEIGHTS, metadata={"format": "pt"})
    sd1_kl.save_pretrained(tmp_path / "new")
    for name in ("old", "new"):
        run(tmp_path / name, tmp_path / f"{name}.safetensors")
    old, new = (files.read(tmp_path / f"{name}.safetensors")[0] for name in ("old", "new"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in new)


def test_a_vae_with_one_layer_under_both_names_is_refused(tmp_path: Path, sd1_kl: AutoencoderKL) -> None:
    state = dict(sd1_kl.state_dict())
    state["encoder.mid_block.attentions.0.query.weight"] = state["encoder.mid_block.attentions.0.to_q.weight"].clone()
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"does not have, encoder\.mid_block\.attentions\.0\.query\.weight"):
        open_any(tmp_path / WEIGHTS)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_what_a_training_leaves_beside_a_vae_is_left_out(tmp_path: Path, run, prefix: str, sd1_kl) -> None:
    """kl-f8 of latent-diffusion, and what A1111 reads."""
    sd1_kl.save_pretrained(tmp_path / "vae")
    (plain,) = run(tmp_path / "vae", tmp_path / "plain.safetensors")
    beside = {"loss.logvar": torch.zeros(()), "model_ema.num_updates": torch.tensor(3, dtype=torch.int32)}
    state = files.read(plain)[0]
    save_file({f"{prefix}{name}": tensor for name, tensor in (state | beside).items()}, tmp_path / "kl.safetensors")
    (written,) = run(tmp_path / "kl.safetensors", tmp_path / "out.safetensors")
    assert files.read(written)[0].keys() == state.keys()


def test_shards_of_a_variant_are_found_by_their_folder_and_by_their_index(
    tmp_path: Path, run, transformer: SD3Transformer2DModel
) -> None:
    folder = tmp_path / "transformer"
    transformer.save_pretrained(folder, max_shard_size="1MB", variant="fp16")
    index = folder / f"{WEIGHTS}.index.fp16.json"
    assert index.is_file()
    for i, source in enumerate((tmp_path, folder, index)):
        (written,) = run(source, tmp_path / f"{i}.safetensors")
        assert len(files.read_metadata(written)[0]) > 50


@pytest.mark.parametrize("index", [False, True])
def test_a_vae_is_read_beside_a_transformer_that_is_still_to_be_downloaded(
    tmp_path: Path, run, pipeline: Path, index: bool
) -> None:
    for shard in (pipeline / "transformer").glob("*.safetensors"):
        shard.unlink()
    if not index:
        (pipeline / "transformer" / f"{WEIGHTS}.index.json").unlink()
    opened = open_any(pipeline)
    assert list(opened.parts) == ["vae"] and "(transformer/ holds no weights)" in opened.detected.description
    assert belonging(opened).name == "sd3"  # the units in vae/config.json
    assert run(pipeline, tmp_path / "vae.safetensors") == [tmp_path / "vae.safetensors"]


def test_a_transformer_that_is_there_in_part_is_refused_and_so_is_a_folder_of_nothing(pipeline: Path) -> None:
    shards = sorted((pipeline / "transformer").glob("*.safetensors"))
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[0].name} is not there"):
        open_any(pipeline)
    for file in pipeline.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"names .* files, of which"):
        open_any(pipeline)
    for file in pipeline.rglob("*.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no weights that are known"):
        open_any(pipeline)


# Damage that a hash tells


def test_verify_compares_every_file_of_a_folder_that_holds_a_hash(pipeline: Path) -> None:
    shards = sorted((pipeline / "transformer").glob("*.safetensors"))
    vae, of = pipeline / "vae" / WEIGHTS, len(shards) + 1
    said = [f"the data of 0 of {of} files is what it was saved with; {of} hold no hash to compare it with"]
    assert inspect.verify(pipeline)[1:] == said
    saved_anew(vae)
    saved_anew(shards[1])
    said = [f"the data of 2 of {of} files is what it was saved with; {of - 2} hold no hash to compare it with"]
    assert inspect.verify(pipeline)[1:] == said
    flip(vae)
    with pytest.raises(CheckpointError, match=rf"vae/{WEIGHTS}.*{files.HASH_KEY}"):
        inspect.verify(pipeline)
    saved_anew(vae)
    flip(shards[1])
    for place in (pipeline, pipeline / "transformer"):
        with pytest.raises(CheckpointError, match=rf"{shards[1].name}.*{files.HASH_KEY}"):
            inspect.verify(place)


def test_verify_compares_a_file_whatever_its_ending(tmp_path: Path, kl: AutoencoderKL) -> None:
    files.save(tmp_path / "vae.safetensors", kl.state_dict(), {})
    for name in ("vae.sft", "VAE.SAFETENSORS"):
        shutil.copy(tmp_path / "vae.safetensors", tmp_path / name)
        assert inspect.verify(tmp_path / name)[1] == "the data is what it was saved with"
        flip(tmp_path / name)
        with pytest.raises(CheckpointError, match=files.HASH_KEY):
            inspect.verify(tmp_path / name)


def test_a_damaged_file_of_another_tool_is_told_and_read(
    tmp_path: Path, kl: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "vae.safetensors"
    files.save(path, kl.state_dict(), {})
    with caplog.at_level(logging.WARNING):
        open_any(path)
        assert not caplog.messages
        flip(path)
        assert open_any(path).parts["vae"]
    assert len(caplog.messages) == 1 and str(path) in caplog.text and files.HASH_KEY in caplog.text
    caplog.clear()
    open_any(path, most=path.stat().st_size - 1)
    assert not caplog.messages


def test_a_damaged_file_of_ours_is_refused_and_can_be_looked_at(
    tmp_path: Path, make_davae: Callable[..., DAVAE]
) -> None:
    save_autoencoder(tmp_path / "a.safetensors", make_davae())
    flip(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=files.HASH_KEY):
        open_any(tmp_path / "a.safetensors")
    assert inspect.describe(tmp_path / "a.safetensors")["kind"] == "autoencoder"


# Units that a config.json states


@pytest.mark.parametrize(
    ("config", "units", "base"),
    [
        ({"scaling_factor": 1.0, "shift_factor": 0.0}, (0.0, 1.0), "units:0.0,1.0"),
        ({"scaling_factor": 2, "shift_factor": None}, (0.0, 2.0), "units:0.0,2.0"),
        ({}, (0.0, 0.18215), "units:0.0,0.18215"),  # AutoencoderKL's own default
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.1159, 0.3611), "flux1"),
    ],
)
def test_the_units_that_a_vae_states_go_with_it(
    tmp_path: Path, run, kl: AutoencoderKL, config: dict[str, float | None], units: tuple[float, float], base: str
) -> None:
    kl.save_pretrained(tmp_path / "vae")
    told = json.loads((tmp_path / "vae" / "config.json").read_text())
    plain = {name: value for name, value in told.items() if name not in ("scaling_factor", "shift_factor")}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(plain | config))
    assert belonging(open_any(tmp_path / "vae")).name == base
    (native,) = run(tmp_path / "vae", tmp_path / "v.safetensors")
    for i, source in enumerate((tmp_path / "vae", native)):
        run(source, tmp_path / f"d{i}", "--to", "diffusers")
        again = AutoencoderKL.from_pretrained(tmp_path / f"d{i}" / "vae")
        assert (again.config.shift_factor, again.config.scaling_factor) == units


def test_a_vae_of_four_channels_without_units_has_those_of_diffusers(tmp_path: Path, sd1_kl: AutoencoderKL) -> None:
    sd1_kl.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert belonging(open_any(tmp_path)).name == "sd1"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "another tool's"}))
    assert belonging(open_any(tmp_path)).name == ""


@pytest.mark.parametrize("config", [{"scaling_factor": "1"}, {"scaling_factor": 0}, {"shift_factor": [0.1]}])
def test_units_that_are_no_numbers_are_refused(tmp_path: Path, kl: AutoencoderKL, config: dict[str, object]) -> None:
    kl.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | config))
    with pytest.raises(CheckpointError, match=rf"config\.json: {next(iter(config))} is .*expected a number from"):
        open_any(tmp_path)


def test_units_for_each_channel_are_told_and_left(
    tmp_path: Path, sd1_kl: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    """As playgroundai's SDXL-like models state them."""
    sd1_kl.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}))
    assert belonging(open_any(tmp_path)).name == ""
    assert "config.json states units for each channel" in caplog.text
