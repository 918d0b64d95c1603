"""Files: what goes in comes out, a save is whole or not at all, and every wrong file is told from every other."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from davae_core import atomic
from davae_core.adapter import PAPER_TARGETS, Adapter, Recommended, merge, zero_adapter
from davae_core.autoencoder import Autoencoder
from davae_core.checkpoints import (
    MergedModel,
    detect,
    files,
    load_adapter,
    load_autoencoder,
    load_few_step_lora,
    load_merged,
    load_predictor,
    load_text_encoder,
    load_tiny_decoder,
    metadata,
    save_adapter,
    save_autoencoder,
    save_few_step_lora,
    save_merged,
    save_predictor,
    save_text_encoder,
    save_tiny_decoder,
)
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError
from davae_core.few_steps import FewStepLora
from davae_core.latent import LatentSpec
from davae_core.lock import holding
from davae_core.mmdit import MMDiT
from davae_core.predictor import DetailPredictor, PredictorConfig
from davae_core.text_encoder import TextEncoder, TextEncoderConfig
from davae_core.tiny_decoder import TinyDecoder, TinyDecoderConfig

State = dict[str, torch.Tensor]
Load = Callable[[Path], Any]
MakeDavae = Callable[..., DAVAE]

LOADERS: dict[str, Load] = {
    "autoencoder": load_autoencoder,
    "adapter": load_adapter,
    "model": load_merged,
    "text_encoder": load_text_encoder,
    "predictor": load_predictor,
    "tiny_decoder": load_tiny_decoder,
    "few_step_lora": load_few_step_lora,
}
BY_TENSORS = [kind for kind in LOADERS if kind != "few_step_lora"]  # whose tensors are those of any LoRA
SPEC = LatentSpec(
    detail_mean=tuple(0.1 * i - 0.7 for i in range(16)), detail_std=tuple(0.3 + 0.01 * i for i in range(16))
)
ADVICE = Recommended(size=1024, shift=3.5, cfg=2.5, steps=30)


def make_adapter(model: MMDiT) -> Adapter:
    made = zero_adapter(model.config, SPEC, rank=4, targets=PAPER_TARGETS)
    for tensor in made.state.values():
        torch.nn.init.normal_(tensor, std=0.05)
    return replace(made, config=replace(made.config, recommended=ADVICE))


def make_merged(model: MMDiT, adapter: Adapter) -> MergedModel:
    return MergedModel(merge(model.state_dict(), adapter), SPEC, ADVICE)


def make_text_encoder() -> TextEncoder:
    return TextEncoder(
        TextEncoderConfig(("red", "blau", "\u043a\u0440\u0443\u0433"), length=6, context=20, pooled=12)
    ).eval()


@pytest.fixture
def adapter(mmdit: MMDiT) -> Adapter:
    return make_adapter(mmdit)


@pytest.fixture
def merged(mmdit: MMDiT, adapter: Adapter) -> MergedModel:
    return make_merged(mmdit, adapter)


@pytest.fixture
def text_encoder() -> TextEncoder:
    return make_text_encoder()


@pytest.fixture(scope="module")
def originals(
    tmp_path_factory: pytest.TempPathFactory, make_davae: MakeDavae, make_mmdit: Callable[..., MMDiT]
) -> Path:
    """A folder with a good file of each kind."""
    folder = tmp_path_factory.mktemp("originals")
    model = make_mmdit(hidden=64)
    adapter = make_adapter(model)
    save_autoencoder(folder / "good_autoencoder.safetensors", make_davae())
    save_adapter(folder / "good_adapter.safetensors", adapter)
    save_merged(folder / "good_model.safetensors", make_merged(model, adapter))
    save_text_encoder(folder / "good_text_encoder.safetensors", make_text_encoder())
    save_predictor(folder / "good_predictor.safetensors", DetailPredictor(PredictorConfig(SPEC, width=32, blocks=1)))
    save_tiny_decoder(folder / "good_tiny_decoder.safetensors", TinyDecoder(TinyDecoderConfig(SPEC, (8,) * 5)))
    save_few_step_lora(folder / "good_few_step_lora.safetensors", FewStepLora(SPEC, ADVICE, adapter.lora_state()))
    return folder


@pytest.fixture
def written(originals: Path, tmp_path: Path) -> dict[str, Path]:
    """A good file of each kind, by kind, for the test to spoil."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return {kind: tmp_path / f"good_{kind}.safetensors" for kind in LOADERS}


def assert_same(loaded: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


def rewrite(path: Path, tensors: Mapping[str, Any] | None = None, **info: str | None) -> Path:
    """Write a file again with some tensors and metadata changed; None takes one away. ``davae_x`` is ``davae.x``."""
    state, told = files.read(path)
    changed = {name: tensor for name, tensor in {**state, **(tensors or {})}.items() if tensor is not None}
    keys = {name.replace("_", ".", 1): value for name, value in info.items()}
    save_file(changed, path, metadata={key: value for key, value in {**told, **keys}.items() if value is not None})
    return path


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the tensor data, read by the format's definition."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def message_of(load: Load, path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path)
    return str(error.value)


# What goes in comes out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"detail": 48, "shared_trunk": False},
        {"detail": 16, "scale": 4, "base_decoder": True},
    ],
)
def test_autoencoder_comes_back_bit_for_bit(
    tmp_path: Path, make_davae: MakeDavae, dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    model = make_davae(**shape).to(dtype)
    count = model.latent.detail_channels
    model.set_detail_statistics(tuple(0.1 / 3 * i for i in range(count)), tuple(1 / 3 + i for i in range(count)))
    save_autoencoder(tmp_path / "a.safetensors", model, ADVICE)
    loaded = load_autoencoder(tmp_path / "a.safetensors")
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.config == model.config
    assert not loaded.training
    z = torch.randn(1, model.latent.channels, 2, 2).to(dtype)
    assert torch.equal(loaded.decode(z), model.decode(z))


def test_a_loaded_autoencoder_takes_the_asked_dtype(tmp_path: Path, davae: DAVAE) -> None:
    save_autoencoder(tmp_path / "a.safetensors", davae)
    loaded = load_autoencoder(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert_same(loaded.state_dict(), {name: tensor.bfloat16() for name, tensor in davae.state_dict().items()})


def test_a_shared_trunk_is_stored_once(tmp_path: Path, make_davae: MakeDavae) -> None:
    save_autoencoder(tmp_path / "shared.safetensors", make_davae())
    save_autoencoder(tmp_path / "separate.safetensors", make_davae(shared_trunk=False))
    shared, _ = files.read_metadata(tmp_path / "shared.safetensors")
    separate, _ = files.read_metadata(tmp_path / "separate.safetensors")
    assert {name.split(".")[0] for name in separate.keys() - shared.keys()} == {"detail_trunk"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapter_comes_back_bit_for_bit(tmp_path: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    given = replace(adapter, state={name: tensor.to(dtype) for name, tensor in adapter.state.items()})
    save_adapter(tmp_path / "a.safetensors", given)
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert_same(loaded.state, given.state)
    assert loaded.config == given.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_model_comes_back_bit_for_bit(tmp_path: Path, merged: MergedModel, dtype: torch.dtype) -> None:
    given = replace(merged, state={name: tensor.to(dtype) for name, tensor in merged.state.items()})
    save_merged(tmp_path / "m.safetensors", given)
    loaded = load_merged(tmp_path / "m.safetensors")
    assert_same(loaded.state, given.state)
    assert (loaded.latent, loaded.recommended) == (SPEC, ADVICE)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_merged_model_may_carry_a_checkpoints_prefix(tmp_path: Path, merged: MergedModel, prefix: str) -> None:
    other = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    given = replace(merged, state={f"{prefix}{name}": tensor for name, tensor in merged.state.items()} | other)
    save_merged(tmp_path / "m.safetensors", given)
    assert_same(load_merged(tmp_path / "m.safetensors").state, merged.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_encoder_comes_back_bit_for_bit(tmp_path: Path, text_encoder: TextEncoder, dtype: torch.dtype) -> None:
    text_encoder.to(dtype)
    save_text_encoder(tmp_path / "t.safetensors", text_encoder)
    loaded = load_text_encoder(tmp_path / "t.safetensors")
    assert_same(loaded.state_dict(), text_encoder.state_dict())
    assert loaded.config == text_encoder.config
    assert loaded.tokenize("red BLAU green") == [2, 3, 1]


def test_tensors_in_any_memory_layout_are_stored_alike(tmp_path: Path) -> None:
    plain = torch.randn(6, 4, 3, 3)
    laid_out = {
        "channels_last": plain.to(memory_format=torch.channels_last),
        "transposed": plain.transpose(0, 1),
        "sliced": plain[::2],
        "expanded": plain[:1].expand(5, -1, -1, -1),
        "front": plain[:3],
        "back": plain[3:],
        "parameter": torch.nn.Parameter(plain.clone()),
        "scalar": torch.tensor(4.0),
    }
    files.save(tmp_path / "x.safetensors", laid_out, {})
    loaded, _ = files.read(tmp_path / "x.safetensors")
    assert_same(loaded, laid_out)


def test_saving_over_a_file_that_is_loaded_leaves_the_loaded_tensors_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.save(path, {"a": torch.full((1000,), 1.0)}, {})
    old, _ = files.read(path)
    files.save(path, {"a": torch.full((1000,), 2.0)}, {})
    assert (old["a"] == 1).all()
    assert (files.read(path)[0]["a"] == 2).all()


def test_folders_are_made_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.safetensors"
    files.save(path, {"a": torch.zeros(1)}, {})
    assert files.read(path)[0].keys() == {"a"}


# Metadata


def test_every_kind_says_what_it_is(written: dict[str, Path]) -> None:
    for kind, path in written.items():
        _, info = files.read_metadata(path)
        assert info["davae.format"] == "1"
        assert info["davae.kind"] == kind
        assert isinstance(json.loads(info["davae.config"]), dict)
        assert info["modelspec.sai_model_spec"] == "1.0.1"
        assert info["modelspec.architecture"] == f"davae/{kind}"
        for key in ("title", "author", "license", "date", "hash_sha256"):
            assert f"modelspec.{key}" in info


def test_the_makers_words_are_kept(tmp_path: Path, adapter: Adapter) -> None:
    title, author = '\u0414\u0438\u0437\u0430\u0439\u043d "2" \\ ü', "Someone\nelse"
    save_adapter(tmp_path / "a.safetensors", adapter, title=title, author=author, licence="CC0-1.0")
    _, info = files.read_metadata(tmp_path / "a.safetensors")
    assert (info["modelspec.title"], info["modelspec.author"], info["modelspec.license"]) == (title, author, "CC0-1.0")


def test_config_holds_the_latent_and_the_recommended_settings(written: dict[str, Path]) -> None:
    _, info = files.read_metadata(written["adapter"])
    config = json.loads(info["davae.config"])
    assert config["latent"]["base_channels"] == config["latent"]["detail_channels"] == 16
    assert (config["latent"]["scale"], config["latent"]["base_factor"]) == (2, 8)
    assert (config["latent"]["base_shift"], config["latent"]["base_scale"]) == (0.0609, 1.5305)
    assert config["latent"]["detail_mean"] == list(SPEC.detail_mean)
    assert config["latent"]["detail_std"] == list(SPEC.detail_std)
    assert config["recommended"] == {"size": 1024, "shift": 3.5, "cfg": 2.5, "steps": 30}


def test_hash_is_that_of_the_tensor_data(written: dict[str, Path]) -> None:
    for path in written.values():
        header, data = header_of(path)
        assert header["__metadata__"]["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"


def test_hash_depends_on_the_tensors_and_not_on_the_metadata(tmp_path: Path) -> None:
    def told(value: float, title: str) -> str:
        files.save(tmp_path / "x.safetensors", {"a": torch.tensor([value])}, {"modelspec.title": title})
        return files.read_metadata(tmp_path / "x.safetensors")[1]["modelspec.hash_sha256"]

    assert told(1.0, "one") == told(1.0, "two") != told(2.0, "one")


def test_header_alone_tells_shapes_and_metadata(tmp_path: Path, adapter: Adapter) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter)
    shapes, info = files.read_metadata(path)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in adapter.state.items()}
    assert info == files.read(path)[1]


# A save is whole or not at all


def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    files.save(path, {"a": torch.ones(4)}, {})

    def give_up_half_way(tensors: State, target: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, target, metadata)
        os.truncate(target, os.path.getsize(target) // 2)
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", give_up_half_way)
        with pytest.raises(CheckpointError, match="no space left"):
            files.save(path, {"a": torch.zeros(4000)}, {})
    assert files.read(path)[0]["a"].tolist() == [1, 1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "x.safetensors"
    files.save(path, {"a": torch.ones(4)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(Exception, match="File too large"):
            files.save(path, {"a": torch.zeros(1_000_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.read(path)[0]["a"].tolist() == [1, 1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["*", ".*.part/x.*"])  # as soon as there is anything new; once the file is whole
def test_a_save_that_is_killed_leaves_the_old_file_and_nothing_that_looks_like_a_model(
    tmp_path: Path, root: Path, moment: str
) -> None:
    path = tmp_path / "x.safetensors"
    files.save(path, {"a": torch.ones(4)}, {})
    script = (
        "import sys, torch\nfrom davae_core.checkpoints import files\n"
        "big = {'a': torch.zeros(25_000_000)}\nprint('ready', flush=True)\nfiles.save(sys.argv[1], big, {})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while not set(tmp_path.glob(moment)) - {path} and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert files.read(path)[0]["a"].tolist() == [1, 1, 1, 1]
    left = [file for file in tmp_path.iterdir() if file != path]
    assert len(left) == 1, "the save was over before it could be killed"
    assert left[0].name.startswith(".") and left[0].suffix != ".safetensors"
    files.save(path, {"a": torch.zeros(2)}, {})
    assert files.read(path)[0]["a"].tolist() == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


# Each wrong file has its own message


@pytest.mark.parametrize("kind", LOADERS)
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    message = message_of(LOADERS[kind], tmp_path / "gone.safetensors")
    assert "gone.safetensors does not exist" in message


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    assert "folder.safetensors does not exist or is not a file" in message_of(
        load_autoencoder, tmp_path / "folder.safetensors"
    )


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("keep", [0, 4, 8, 300, 0.5, -1])
def test_a_file_that_is_cut_off_is_named_with_its_size(written: dict[str, Path], kind: str, keep: float) -> None:
    path = written[kind]
    content = path.read_bytes()
    size = int(len(content) * keep) if 0 < keep < 1 else int(keep) % len(content)
    path.write_bytes(content[:size])
    message = message_of(LOADERS[kind], path)
    assert message.startswith(f"{path.name} is not a readable safetensors file ({size} bytes")
    assert "Copy or download it again" in message


@pytest.mark.parametrize(
    "content", [b"\x00" * 4096, b"\xff" * 4096, b"<!DOCTYPE html><html>Not Found</html>", b"PK\x03\x04" * 99]
)
def test_garbage_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(content)
    for load in LOADERS.values():
        message = message_of(load, path)
        assert message.startswith("garbage.safetensors is not a readable safetensors file")
        assert "damaged, cut off, or of another format" in message


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PT"])
def test_a_pickled_file_is_refused_unread(tmp_path: Path, suffix: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Trap()))
    message = message_of(load_autoencoder, path)
    assert message.startswith(f"model{suffix} is a pickled file, which can run code")
    assert "Convert it to safetensors" in message
    path.rename(tmp_path / "renamed.safetensors")
    assert "not a readable safetensors file" in message_of(load_autoencoder, tmp_path / "renamed.safetensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("wanted", LOADERS)
@pytest.mark.parametrize("given", LOADERS)
def test_a_good_file_of_another_kind_is_told_apart(written: dict[str, Path], wanted: str, given: str) -> None:
    if wanted == given:
        LOADERS[wanted](written[given])
        return
    message = message_of(LOADERS[wanted], written[given])
    descriptions = {
        "autoencoder": "a DA-VAE autoencoder",
        "adapter": "a DA-VAE adapter",
        "model": "an SD3.5 diffusion model with 32 channels (a merged DA-VAE model)",
        "text_encoder": "the text encoder of the tiny model",
        "predictor": "a DA-VAE detail predictor",
        "tiny_decoder": "a tiny decoder of DA-VAE latents",
        "few_step_lora": "a few-step LoRA for an adapted model",
    }
    choices = {
        "autoencoder": "choose a DA-VAE autoencoder (models/vae)",
        "adapter": "choose a DA-VAE adapter (models/loras)",
        "model": "choose a merged DA-VAE model (models/diffusion_models)",
        "text_encoder": "choose the tiny model's text encoder (models/text_encoders)",
        "predictor": "choose a DA-VAE detail predictor (models/latent_upscale_models)",
        "tiny_decoder": "choose a tiny decoder of DA-VAE latents (models/vae_approx)",
        "few_step_lora": "choose a few-step LoRA (models/loras)",
    }
    assert message.startswith(f"{written[given].name} is {descriptions[given]}; {choices[wanted]}")


def test_a_plain_sd3_vae_is_no_davae(tmp_path: Path, toy_vae: Any) -> None:
    path = tmp_path / "sd3_vae.safetensors"
    files.save(path, Autoencoder(toy_vae).state_dict(), {})
    message = message_of(load_autoencoder, path)
    assert message.startswith(
        "sd3_vae.safetensors is a plain VAE with 16 latent channels, like SD3 / SD3.5 or FLUX.1's (no detail branch)"
    )
    assert message.endswith("choose a DA-VAE autoencoder (models/vae)")


def test_a_lora_is_no_adapter(tmp_path: Path, adapter: Adapter) -> None:
    path = tmp_path / "style.safetensors"
    files.save(path, adapter.lora_state(), {})
    message = message_of(load_adapter, path)
    assert message.startswith("style.safetensors is a LoRA (without the DA-VAE embedder and head)")
    assert message.endswith("choose a DA-VAE adapter (models/loras)")


def test_an_unadapted_model_is_no_merged_one(tmp_path: Path, mmdit: MMDiT) -> None:
    path = tmp_path / "sd35.safetensors"
    for prefix in ("", "model.diffusion_model."):
        files.save(path, {f"{prefix}{name}": tensor for name, tensor in mmdit.state_dict().items()}, {})
        message = message_of(load_merged, path)
        assert message.startswith("sd35.safetensors is an unadapted SD3 / SD3.5 diffusion model with 16 channels")
        assert message.endswith("choose a merged DA-VAE model (models/diffusion_models)")


def test_a_stranger_is_told_by_its_number_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    files.save(path, {"a": torch.zeros(1), "b": torch.zeros(1)}, {})
    for load in LOADERS.values():
        assert message_of(load, path).startswith("other.safetensors is a file of 2 tensors that is none of the known")


@pytest.mark.parametrize("kind", BY_TENSORS)
def test_missing_metadata_is_told(written: dict[str, Path], kind: str) -> None:
    path = written[kind]
    save_file(files.read(path)[0], path)
    message = message_of(LOADERS[kind], path)
    assert path.name in message
    assert "no DA-VAE metadata" in message


@pytest.mark.parametrize("kind", LOADERS)
def test_a_newer_format_asks_for_an_update(written: dict[str, Path], kind: str) -> None:
    message = message_of(LOADERS[kind], rewrite(written[kind], davae_format="2"))
    assert message.startswith(f"{written[kind].name} has file format '2', this version reads '1'")
    assert "update the node pack" in message


LONG = {
    "text": "x" * 100_000,
    "brackets": "[" * 100_000,
    "value": json.dumps({"latent": "x" * 100_000}),
    "name": json.dumps({"latent": {"x" * 100_000: 1}}),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("key", ["kind", "format", "config", "history"])
@pytest.mark.parametrize("content", LONG)
def test_a_message_does_not_repeat_what_no_one_reads(
    written: dict[str, Path], kind: str, key: str, content: str
) -> None:
    path = rewrite(written[kind], **{f"davae_{key}": LONG[content]})
    if key == "history" and (content in ("value", "name") or kind == "text_encoder"):
        LOADERS[kind](path)  # what a later version tells of itself; a text encoder has no history
        return
    message = message_of(LOADERS[kind], path)
    assert path.name in message and len(message) < 600


@pytest.mark.parametrize("kind", BY_TENSORS)
def test_metadata_of_another_kind_contradicts(written: dict[str, Path], kind: str) -> None:
    claimed = "adapter" if kind != "adapter" else "model"
    message = message_of(LOADERS[kind], rewrite(written[kind], davae_kind=claimed))
    assert written[kind].name in message
    assert claimed in message and f"{kind!r}" in message


@pytest.mark.parametrize("kind", ["autoencoder", "adapter", "model"])
@pytest.mark.parametrize(
    "config",
    [None, "", "{", "null", "[1]", "{}", '{"latent": 1}', '{"latent": {"depth": 3}}', '{"latent": {"scale": 3}}'],
)
def test_a_damaged_configuration_is_told(written: dict[str, Path], kind: str, config: str | None) -> None:
    message = message_of(LOADERS[kind], rewrite(written[kind], davae_config=config))
    assert message.startswith(f"{written[kind].name}: the configuration in its metadata is damaged")


@pytest.mark.parametrize(
    ("kind", "setting", "value", "told"),
    [
        ("autoencoder", "detail_channels", 32, "weights have detail_channels = 16, its metadata says 32"),
        ("autoencoder", "scale", 4, "weights have scale = 2, its metadata says 4"),
        ("autoencoder", "base_factor", 4, "weights have base_factor = 8, its metadata says 4"),
        ("autoencoder", "base_channels", 8, "weights have base_channels = 16, its metadata says 8"),
        ("adapter", "detail_channels", 32, "weights have detail_channels = 16, its metadata says 32"),
        ("adapter", "base_channels", 8, "weights have base_channels = 16, its metadata says 8"),
        ("model", "detail_channels", 32, "weights read 32 and predict 32 channels, its metadata says 48"),
    ],
)
def test_metadata_that_contradicts_the_shapes_is_told(
    written: dict[str, Path], kind: str, setting: str, value: int, told: str
) -> None:
    path = written[kind]
    config = json.loads(files.read_metadata(path)[1]["davae.config"])
    kept = ("base_channels", "detail_channels", "scale", "base_factor", "base_shift", "base_scale")
    config["latent"] = {key: config["latent"][key] for key in kept} | {setting: value}
    message = message_of(LOADERS[kind], rewrite(path, davae_config=json.dumps(config)))
    assert message.startswith(path.name)
    assert told in message
    assert "the file is damaged" in message


@pytest.mark.parametrize("missing", ["base_shift", "base_scale"])
def test_a_latent_without_its_units_is_not_taken_for_sd3s(written: dict[str, Path], missing: str) -> None:
    path = written["autoencoder"]
    config = json.loads(files.read_metadata(path)[1]["davae.config"])
    del config["latent"][missing]
    message = message_of(LOADERS["autoencoder"], rewrite(path, davae_config=json.dumps(config)))
    assert f"latent.{missing} is not there" in message and "cannot be told which base model" in message


@pytest.mark.parametrize(
    "vocabulary", ['{"vocabulary": ["red"]}', '{"vocabulary": [1, 2, 3]}', '{"vocabulary": 3}', "{}"]
)
def test_a_vocabulary_that_does_not_fit_its_embeddings_is_told(written: dict[str, Path], vocabulary: str) -> None:
    path = written["text_encoder"]
    message = message_of(load_text_encoder, rewrite(path, davae_config=vocabulary))
    assert message == f"{path.name}: its vocabulary is not 3 words, one for each embedding; the file is damaged"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("autoencoder", "decoder.up.1.block.0.norm2.weight"),
        ("adapter", "transformer.transformer_blocks.1.attn.to_v.lora_B.weight"),
        ("model", "final_layer.linear.weight"),
        ("text_encoder", "position_embedding"),
    ],
)
def test_weights_that_are_not_numbers_are_told_by_name(
    written: dict[str, Path], kind: str, tensor: str, bad: float, dtype: torch.dtype
) -> None:
    path = written[kind]
    broken = files.read(path)[0][tensor].to(dtype)
    broken.view(-1)[-1] = bad
    message = message_of(LOADERS[kind], rewrite(path, {tensor: broken}))
    assert message.startswith(f"{path.name}: the tensor {tensor} holds values that are not numbers")
    assert "Use another file" in message


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("autoencoder", "decoder.conv_out.weight"),
        ("autoencoder", "detail_down.conv.bias"),
        ("text_encoder", "pool.bias"),
    ],
)
def test_a_missing_tensor_is_told_with_the_file(written: dict[str, Path], kind: str, tensor: str) -> None:
    message = message_of(LOADERS[kind], rewrite(written[kind], {tensor: None}))
    assert message.startswith(f"{written[kind].name} lacks 1 tensor of its model, {tensor}")
    assert tensor in message


def test_a_tensor_of_another_shape_is_told_with_the_file(written: dict[str, Path]) -> None:
    path = rewrite(written["autoencoder"], {"decoder.conv_out.bias": torch.zeros(4)})
    message = message_of(load_autoencoder, path)
    assert message.startswith(path.name)
    assert "decoder.conv_out.bias" in message and "[4]" in message


def test_a_tensor_too_many_is_told_with_the_file(written: dict[str, Path]) -> None:
    message = message_of(load_autoencoder, rewrite(written["autoencoder"], {"decoder.extra": torch.zeros(4)}))
    assert message.startswith(written["autoencoder"].name)
    assert "decoder.extra" in message


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("autoencoder", "joint_up.conv.weight"),
        ("autoencoder", "base_encoder.conv_in.weight"),
        ("adapter", "davae.final_layer.linear.detail.weight"),
        ("adapter", "transformer.transformer_blocks.1.attn.to_v.lora_B.weight"),
        ("model", "pos_embed"),
        ("model", "final_layer.linear.weight"),
    ],
)
def test_a_missing_tensor_that_tells_the_shape_is_told_with_the_file(
    written: dict[str, Path], kind: str, tensor: str
) -> None:
    message = message_of(LOADERS[kind], rewrite(written[kind], {tensor: None}))
    assert message.startswith(written[kind].name)
    assert tensor in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_merged_model_in_float8_is_read(tmp_path: Path, merged: MergedModel, dtype: torch.dtype) -> None:
    given = replace(merged, state={name: tensor.to(dtype) for name, tensor in merged.state.items()})
    save_merged(tmp_path / "m.safetensors", given)
    assert load_merged(tmp_path / "m.safetensors").state["pos_embed"].dtype == dtype


@pytest.mark.parametrize("kind", ["autoencoder", "adapter", "model"])
@pytest.mark.parametrize(
    "changes",
    [
        {"detail_mean": [float("nan")] * 16},
        {"detail_std": [float("inf")] * 16},
        {"base_shift": float("nan")},
        {"detail_mean": ["0"] * 16},
    ],
)
def test_statistics_that_are_not_numbers_are_told(written: dict[str, Path], kind: str, changes: dict[str, Any]) -> None:
    path = written[kind]
    config = json.loads(files.read_metadata(path)[1]["davae.config"])
    config["latent"] |= changes
    message = message_of(LOADERS[kind], rewrite(path, davae_config=json.dumps(config)))
    assert message.startswith(f"{path.name}: the configuration in its metadata is damaged")


def test_unknown_settings_are_told_by_name(written: dict[str, Path]) -> None:
    path = written["adapter"]
    config = json.loads(files.read_metadata(path)[1]["davae.config"])
    config["recommended"]["colour"] = 3
    message = message_of(load_adapter, rewrite(path, davae_config=json.dumps(config)))
    assert "unknown settings in recommended: colour" in message


def test_recommended_settings_may_be_left_out(written: dict[str, Path]) -> None:
    path = written["adapter"]
    config = json.loads(files.read_metadata(path)[1]["davae.config"])
    del config["recommended"]
    assert load_adapter(rewrite(path, davae_config=json.dumps(config))).config.recommended == Recommended()


# Telling files apart


@pytest.mark.parametrize("kind", BY_TENSORS)
def test_our_own_kinds_are_known_by_shapes_and_by_tensors(written: dict[str, Path], kind: str) -> None:
    assert detect(files.read_metadata(written[kind])[0]).kind == kind
    assert detect(files.read(written[kind])[0]).kind == kind


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"decoder.conv_in.weight": (512, 16, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}, "vae"),
        ({"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}, "vae"),
        (
            {
                "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
                "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
            },
            "vae",
        ),
        ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "unet"),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
                "first_stage_model.quant_conv.bias": (8,),
            },
            "unet",
        ),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 64)}, "lora"),
        ({"lora_unet_x.lora_down.weight": (4, 64), "lora_unet_x.lora_up.weight": (64, 4)}, "lora"),
        ({}, "unknown"),
        ({"something.weight": (1,)}, "unknown"),
    ],
)
def test_other_peoples_files_are_known(shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    assert detect(shapes).kind == kind


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize(
    ("channels", "beside", "kind"),
    [
        (16, None, "sd3 model"),
        (16, "first_stage_model.encoder.conv_in.weight", "sd3 checkpoint"),
        (16, "text_encoders.clip_l.logit_scale", "sd3 checkpoint"),
        (32, None, "model"),
        (64, "first_stage_model.encoder.conv_in.weight", "model"),
    ],
)
def test_sd3_models_are_known_by_their_channels(prefix: str, channels: int, beside: str | None, kind: str) -> None:
    shapes = {
        f"{prefix}joint_blocks.0.x_block.attn.qkv.weight": (192, 64),
        f"{prefix}x_embedder.proj.weight": (64, channels, 2, 2),
    }
    found = detect(shapes | ({beside: (1,)} if beside else {}))
    assert found.kind == kind
    assert (str(channels) in found.description) == (kind != "sd3 checkpoint")


def test_every_kind_of_metadata_is_read_back_by_the_parser() -> None:
    config = metadata.latent_config(SPEC, ADVICE)
    for kind in LOADERS:
        info = metadata.build(kind, config, title="x")  # type: ignore[arg-type]
        assert metadata.kind_of(info) == kind
        assert metadata.latent_of(metadata.parse(info, kind, "x"), "x") == (SPEC, ADVICE)  # type: ignore[arg-type]
    assert metadata.kind_of({}) is None


# What a save and a load must not stumble over


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    files.save(tmp_path / "x.safetensors", {"whole": whole, "same": whole, "half": whole[:3]}, {})
    state, _ = files.read(tmp_path / "x.safetensors")
    assert torch.equal(state["whole"], whole) and torch.equal(state["same"], whole)
    assert torch.equal(state["half"], whole[:3])


def test_the_remains_of_a_killed_save_are_removed_by_the_next_and_those_of_a_live_one_stay(tmp_path: Path) -> None:
    for name in ("dead", "live", "new"):
        (tmp_path / f".x.safetensors.{name}.part").mkdir()
    (tmp_path / ".y.safetensors.dead.part").mkdir()
    for name in ("dead", "live"):
        (tmp_path / f".x.safetensors.{name}.part" / atomic.LOCK).touch()
    with holding(tmp_path / ".x.safetensors.live.part" / atomic.LOCK) as free:
        assert free
        files.save(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    left = {".x.safetensors.live.part", ".x.safetensors.new.part", ".y.safetensors.dead.part", "x.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_a_merged_model_that_lacks_a_block_tensor_is_told(written: dict[str, Path]) -> None:
    path = written["model"]
    message = message_of(load_merged, rewrite(path, {"joint_blocks.1.x_block.mlp.fc1.weight": None}))
    assert message.startswith(path.name) and "joint_blocks.1.x_block.mlp.fc1.weight" in message


def test_lora_factors_of_different_ranks_are_told(written: dict[str, Path]) -> None:
    path = written["adapter"]
    name = next(name for name in files.read(path)[0] if name.endswith("lora_B.weight"))
    message = message_of(load_adapter, rewrite(path, {name: torch.zeros(128, 7)}))
    assert message.startswith(path.name) and name.removesuffix(".lora_B.weight") in message and "[128, 7]" in message
