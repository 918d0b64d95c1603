"""What cannot be converted is refused with its reason, and leaves nothing behind."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import files, inspect, save_autoencoder
from davae_core.checkpoints.diffusers_names import vae_rules
from davae_core.checkpoints.names import from_native
from davae_core.checkpoints.tensors import in_memory
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError
from harness import warm

State = dict[str, torch.Tensor]


@pytest.fixture
def refused(tmp_path: Path, run) -> Callable[..., str]:
    """``refused(src, *options)``: why nothing was written."""

    def convert(src: Path, *options: object) -> str:
        target = tmp_path / "target"
        for dst in (target / "x.safetensors", target):
            with pytest.raises(CheckpointError) as error:
                run(src, dst, *options)
            assert not target.exists() or not list(target.iterdir())
        return str(error.value)

    return convert


@pytest.fixture(scope="module")
def vae() -> State:
    return Autoencoder(AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1)).state_dict()


class Runs:
    """What an evil pickle holds: reading it calls a function."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def release_state(width: int = 32) -> State:
    """The release's autoencoder, for refusals that come before it is run."""
    plain = Autoencoder(AutoencoderConfig(widths=(32, 32, 32, width), blocks=1)).state_dict()
    theirs = from_native(in_memory(plain), vae_rules(AutoencoderConfig((32, 32, 32, width), 1)))
    state = {f"{prefix}{name}": t for prefix in ("vae.", "original_vae_model.vae.") for name, t in theirs.items()}
    return state | {
        "dc_down.conv.weight": torch.zeros(8, width, 3, 3),
        "dc_down.conv.bias": torch.zeros(8),
        "dc_up.conv.weight": torch.zeros(4 * width, 32, 3, 3),
        "dc_up.conv.bias": torch.zeros(4 * width),
    }


def write_statistics(folder: Path, count: int = 16, value: float = 1.0) -> None:
    told = {"mean": [0.0] * count, "std": [value] * count}
    (folder / "latent_norm_stats.json").write_text(json.dumps(told))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, refused) -> None:
    ran = tmp_path / "ran"
    torch.save({"state_dict": Runs(ran)}, tmp_path / "pytorch_model.bin")
    said = refused(tmp_path / "pytorch_model.bin")
    assert "asks for code to be run" in said and "pytorch_model.bin" in said
    assert not ran.exists()


def test_a_damaged_pickle_and_one_of_another_model_are_refused(tmp_path: Path, refused, vae: State) -> None:
    (tmp_path / "cut.bin").write_bytes(b"PK\x03\x04 cut off")
    assert "damaged" in refused(tmp_path / "cut.bin")
    torch.save(vae, tmp_path / "vae.pt")
    assert "take the model's .safetensors file" in refused(tmp_path / "vae.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in refused(tmp_path / "list.pt")


def test_the_release_without_statistics_is_refused(tmp_path: Path, refused) -> None:
    torch.save(release_state(), tmp_path / "pytorch_model.bin")
    said = refused(tmp_path / "pytorch_model.bin")
    assert "latent_norm_stats.json" in said and "--statistics" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"mean": [0], "std": [1]}', "expected 16 of each"),
        ('{"mean": [0]}', "std is None"),
        ("not json", "no statistics file"),
        (json.dumps({"mean": [0] * 16, "std": [0] * 16}), "above 0"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path: Path, refused, text: str, message: str) -> None:
    torch.save(release_state(), tmp_path / "pytorch_model.bin")
    (tmp_path / "latent_norm_stats.json").write_text(text)
    assert message in refused(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("dc_up.conv.weight", torch.zeros(128, 48, 3, 3), "does not fit a base VAE"),
        ("dc_down.conv.bias", torch.zeros(7), "does not fit a base VAE"),
        ("vae.decoder.mid_block.resnets.0.conv1.weight", torch.zeros(32, 16, 3, 3), "expected [32, 32, 3, 3]"),
        ("vae.decoder.conv_out.weight", None, "lacks 1 tensors"),
        ("vae.decoder.more.weight", torch.zeros(1), "decoder.more.weight"),
        ("dc_down.conv.bias", torch.full((8,), torch.nan), "NaN"),
    ],
)
def test_a_damaged_release_is_refused(
    tmp_path: Path, refused, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    state = {key: value for key, value in {**release_state(), name: tensor}.items() if value is not None}
    torch.save(state, tmp_path / "pytorch_model.bin")
    write_statistics(tmp_path)
    assert message in refused(tmp_path / "pytorch_model.bin")


def test_a_vae_with_a_wrong_shape_or_nan_is_refused(tmp_path: Path, refused, vae: State) -> None:
    spoilt = {
        "has shape [3, 16, 3, 3], expected [3, 32, 3, 3]": {"decoder.conv_out.weight": torch.zeros(3, 16, 3, 3)},
        "more.weight": {"more.weight": torch.zeros(1)},
        "NaN": {"decoder.conv_out.bias": torch.full((3,), torch.nan)},
    }
    for message, change in spoilt.items():
        files.save(tmp_path / "v.safetensors", {**vae, **change}, {})
        assert message in refused(tmp_path / "v.safetensors")


def test_a_diffusers_folder_with_something_missing_is_refused(
    tmp_path: Path, refused, transformer: SD3Transformer2DModel
) -> None:
    transformer.save_pretrained(tmp_path / "t", max_shard_size="1MB")
    shard = sorted((tmp_path / "t").glob("*.safetensors"))[0]
    shard.unlink()
    assert f"{shard.name} is not there" in refused(tmp_path / "t")
    state = dict(transformer.state_dict())
    del state["norm_out.linear.bias"]
    (tmp_path / "u").mkdir()
    files.save(tmp_path / "u" / "diffusion_pytorch_model.safetensors", state, {})
    assert "norm_out.linear.bias" in refused(tmp_path / "u")
    (tmp_path / "empty").mkdir()
    assert "no weights that are known" in refused(tmp_path / "empty")


def test_an_index_may_not_point_out_of_its_folder(tmp_path: Path, refused) -> None:
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its folder" in refused(tmp_path / "m.safetensors.index.json")


def test_several_models_do_not_go_into_one_file(tmp_path: Path, run, make_mmdit, vae: State) -> None:
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in make_mmdit().state_dict().items()}
    whole |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    files.save(tmp_path / "w.safetensors", whole, {})
    with pytest.raises(CheckpointError, match="diffusion_model, vae, which do not go into one file"):
        run(tmp_path / "w.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not clip_l"):
        run(tmp_path / "w.safetensors", tmp_path / "x.safetensors", "--part", "clip_l")
    assert not (tmp_path / "x.safetensors").exists()


def test_native_files_and_strangers_are_told_apart(tmp_path: Path, refused, make_davae: Callable[..., DAVAE]) -> None:
    save_autoencoder(tmp_path / "a.safetensors", make_davae())
    assert "a native file already" in refused(tmp_path / "a.safetensors")
    files.save(tmp_path / "s.safetensors", {"weight": torch.zeros(1)}, {})
    assert "none of the known kinds" in refused(tmp_path / "s.safetensors")


def test_the_command_ends_with_the_reason_and_status_two(tmp_path: Path) -> None:
    told = warm.run("davae_core.checkpoints.inspect", str(tmp_path / "nothing.safetensors"))
    assert told.returncode == 2 and told.stderr.startswith("error: ") and "does not exist" in told.stderr
    assert inspect.parser().prog == "python -m davae_core.checkpoints.inspect"
