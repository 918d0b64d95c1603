"""Files from strangers: every number, shape and name in them is checked before anything is built from it."""

import io
import json
import os
import struct
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from davae_core import command, tiny
from davae_core.adapter import Adapter, Recommended, zero_adapter
from davae_core.autoencoder import Autoencoder
from davae_core.checkpoints import (
    MergedModel,
    convert,
    files,
    foreign_json,
    header,
    inspect,
    load_adapter,
    load_autoencoder,
    load_merged,
    load_predictor,
    lora,
    metadata,
    save_adapter,
    save_autoencoder,
    save_few_step_lora,
    save_merged,
    save_predictor,
    settings,
    tensors,
)
from davae_core.checkpoints import merge as merging
from davae_core.checkpoints.opening import open_any
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError, DAVAEError
from davae_core.few_steps import FewStepLora
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT
from davae_core.predictor import DetailPredictor, PredictorConfig

Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def adapter_file(tmp_path: Path, mmdit: MMDiT) -> Path:
    save_adapter(tmp_path / "adapter.safetensors", zero_adapter(mmdit.config, LatentSpec(), rank=2))
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def davae_file(tmp_path: Path, davae: DAVAE) -> Path:
    save_autoencoder(tmp_path / "davae.safetensors", davae)
    return tmp_path / "davae.safetensors"


def with_config(path: Path, part: str, name: str, text: str) -> Path:
    """Write a file anew with one setting replaced by a JSON text."""
    state, told = files.read(path)
    config = json.loads(told["davae.config"])
    config[part][name] = "@"
    save_file(state, path, metadata={**told, "davae.config": json.dumps(config).replace('"@"', text)})
    return path


def changed(path: Path, change: Change) -> Path:
    """Write a file anew with other tensors."""
    state, told = files.read(path)
    change(state)
    save_file(state, path, metadata=told)
    return path


def refused(load: Callable[[Path], Any], path: Path, *words: str) -> None:
    """The file is refused by name in under 2 s of work and in little memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(CheckpointError) as error:
            load(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - start < 2
    assert peak < 16 * 2**20
    assert path.name in str(error.value) and len(str(error.value)) < 1000
    for word in words:
        assert word in str(error.value)


# Numbers


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("recommended", "steps", "-5"),
        ("recommended", "steps", "1000000"),
        ("recommended", "steps", "2.5"),
        ("recommended", "steps", '"30"'),
        ("recommended", "steps", "true"),
        ("recommended", "shift", "NaN"),
        ("recommended", "shift", "1e999"),
        ("recommended", "cfg", "-1"),
        ("recommended", "size", "9" * 30),
        ("recommended", "size", "null"),
        ("latent", "base_factor", "7"),
        ("latent", "base_factor", "8.5"),
        ("latent", "detail_channels", "30000000"),
        ("latent", "base_channels", "true"),
        ("latent", "scale", "[2]"),
        ("latent", "base_shift", '"0.06"'),
        ("latent", "base_scale", "0"),
        ("latent", "detail_std", "1"),
        ("latent", "detail_mean", "[" + "0," * 5000 + "0]"),
        ("latent", "preview", '["red"]'),
    ],
)
def test_every_number_of_the_metadata_has_a_type_and_a_range(
    adapter_file: Path, part: str, name: str, value: str
) -> None:
    number_is_named = "damaged" if value in ("NaN", "1e999", "9" * 30) else f"{part}.{name}"
    refused(load_adapter, with_config(adapter_file, part, name, value), number_is_named)


def test_every_setting_has_a_range() -> None:
    """A new field of the two classes must get one."""
    assert {field.name for field in fields(LatentSpec)} == set(settings.LATENT)
    assert {field.name for field in fields(Recommended)} == set(settings.RECOMMENDED)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"latent": []}', '{"latent": {"scale": []}}', "{"])
def test_a_configuration_of_another_form_is_refused(adapter_file: Path, text: str) -> None:
    state, told = files.read(adapter_file)
    save_file(state, adapter_file, metadata={**told, "davae.config": text})
    refused(load_adapter, adapter_file, "the configuration in its metadata is damaged")


# Shapes and dtypes


def replace(name: str, tensor: torch.Tensor) -> Change:
    def change(state: dict[str, torch.Tensor]) -> None:
        assert name in state
        state[name] = tensor

    return change


LORA = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{LORA}.lora_A.weight", torch.zeros(2, 100)),  # this dropped the layer in silence
        (f"{LORA}.lora_B.weight", torch.zeros(96, 2)),
        (f"{LORA}.lora_B.weight", torch.zeros(())),
        (f"{LORA}.lora_A.weight", torch.zeros(2, 128, dtype=torch.int32)),
        (f"{LORA}.alpha", torch.zeros(3)),
        ("davae.x_embedder.proj.detail.weight", torch.zeros(())),
        ("davae.x_embedder.proj.detail.weight", torch.zeros(128, 16, 2, 3)),
        ("davae.final_layer.linear.detail.bias", torch.zeros(())),
        ("davae.final_layer.linear.detail.weight", torch.zeros(64, 127)),
        ("davae.x_embedder.proj.delta.bias", torch.zeros(127)),
        ("davae.final_layer.linear.delta.weight", torch.zeros(1, 128)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{list(value.shape)} {value.dtype}",
)
def test_a_tensor_of_an_adapter_of_a_wrong_shape_or_dtype_is_named(
    adapter_file: Path, name: str, tensor: torch.Tensor
) -> None:
    refused(load_adapter, changed(adapter_file, replace(name, tensor)), name.removesuffix(".alpha").split(".lora")[0])


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("joint_up.conv.weight", torch.zeros(())),
        ("base_encoder.conv_out.weight", torch.zeros(32)),
        ("base_encoder.down.1.block.0.conv1.weight", torch.zeros(32, 32, 3, 0)),
        ("decoder.conv_out.weight", torch.zeros(3, 31, 3, 3)),
        ("decoder.conv_out.bias", torch.zeros(3, dtype=torch.int64)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{list(value.shape)} {value.dtype}",
)
def test_a_tensor_of_an_autoencoder_of_a_wrong_shape_or_dtype_is_named(
    davae_file: Path, name: str, tensor: torch.Tensor
) -> None:
    refused(load_autoencoder, changed(davae_file, replace(name, tensor)), name)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("joint_blocks.1.x_block.mlp.fc1.weight", torch.zeros(512, 127)),  # ComfyUI's own text came, without the file
        ("joint_blocks.0.x_block.attn.qkv.bias", torch.zeros(())),
        ("pos_embed", torch.zeros(256)),
        ("context_embedder.weight", torch.zeros(128, 48, dtype=torch.uint8)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{list(value.shape)} {value.dtype}",
)
def test_a_trunk_of_a_wrong_shape_or_dtype_is_named(
    tmp_path: Path, make_mmdit: Callable[..., MMDiT], name: str, tensor: torch.Tensor
) -> None:
    path = tmp_path / "merged.safetensors"
    save_merged(
        path, MergedModel(make_mmdit(in_channels=32, out_channels=32).state_dict(), LatentSpec(), Recommended())
    )
    assert load_merged(path).latent == LatentSpec()
    refused(load_merged, changed(path, replace(name, tensor)), name)


@pytest.mark.parametrize(
    "stem", ["joint_blocks.{}.x_block.attn.qkv.weight", "base_encoder.down.{}.block.0.norm1.weight"]
)
def test_thousands_of_empty_tensors_are_refused_at_once(davae_file: Path, stem: str) -> None:
    """This took 5 s: a model of as many blocks was built."""
    many = {stem.format(i): torch.zeros(0) for i in range(3000)}
    refused(load_autoencoder, changed(davae_file, lambda state: state.update(many)))
    refused(lambda path: inspect.text(inspect.describe(path)) and load_autoencoder(path), davae_file)


def test_parts_of_a_fused_layer_of_dtypes_that_do_not_mix_are_refused(tmp_path: Path, mmdit: MMDiT) -> None:
    files.save(tmp_path / "base.safetensors", mmdit.state_dict(), {})
    convert.main([str(tmp_path / "base.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"])
    path = tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors"
    name = "transformer_blocks.0.attn.to_k.bias"
    changed(path, replace(name, torch.zeros(128, dtype=torch.float8_e4m3fn)))
    refused(lambda place: convert.main([str(place), str(tmp_path / "out.safetensors")]), path, "dtypes")


def test_a_lora_that_looks_like_a_model_is_named_when_it_is_converted(tmp_path: Path, adapter_file: Path) -> None:
    state = {name: tensor for name, tensor in files.read(adapter_file)[0].items() if ".lora_" in name}
    path = tmp_path / "few_steps.safetensors"
    save_few_step_lora(path, FewStepLora(LatentSpec(), Recommended(), state))
    many = {f"joint_blocks.{i}.x_block.attn.qkv.weight": torch.zeros(0) for i in range(300)}
    changed(path, lambda state: state.update(many))
    with pytest.raises(DAVAEError, match=r"^few_steps\.safetensors: .*300 joint blocks"):
        convert.main([str(path), str(tmp_path / "out"), "--to", "diffusers"])
    assert not (tmp_path / "out").exists()


def test_a_merged_model_of_thousands_of_empty_blocks_is_refused_at_once(
    tmp_path: Path, make_mmdit: Callable[..., MMDiT]
) -> None:
    """This took 5 s and more: they were all built."""
    path = tmp_path / "merged.safetensors"
    state = make_mmdit(in_channels=32, out_channels=32).state_dict()
    save_merged(path, MergedModel(state, LatentSpec(), Recommended()))
    many = {f"joint_blocks.{i}.x_block.attn.qkv.weight": torch.zeros(0) for i in range(2, 3000)}
    refused(load_merged, changed(path, lambda state: state.update(many)), "3000 joint blocks")


# Headers


def with_header(path: Path, text: str, length: int | None = None) -> Path:
    content = text.encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + bytes(64))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}',
        '{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "%s", "shape": [1], "data_offsets": [0, 4]}}' % ("F" * 100_000),
        '{"a": 3}',
        '{"__metadata__": {"a": 3}}',
        '{"' + "a" * 100_000 + '": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
    ids=lambda text: text[:40],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    refused(files.read, with_header(tmp_path / "x.safetensors", text), "not a readable safetensors file")


@pytest.mark.parametrize("length", [0, 1, header.MOST_BYTES + 1, 2**40, 2**64 - 1])
def test_a_header_of_an_impossible_length_is_not_read(tmp_path: Path, length: int) -> None:
    refused(files.read, with_header(tmp_path / "x.safetensors", "{}", length), "bytes")


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MOST_TENSORS", 3)
    save_file({str(i): torch.zeros(1) for i in range(4)}, tmp_path / "x.safetensors")
    refused(files.read, tmp_path / "x.safetensors", "holds 4 tensors, expected at most 3")


# JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' * 100_000, "nested too deep"),
        ('{"a": 1, "a": 2}', "comes twice"),
        ("[]", "expected an object"),
        ("3", "expected an object"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a"', "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_json_of_others_is_bounded(text: str | bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        foreign_json.parse(text, "x.json")
    assert "x.json" in str(error.value)


def test_json_of_others_is_not_read_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_json, "MOST_BYTES", 100)
    (tmp_path / "x.json").write_text('{"a": "' + "x" * 200 + '"}')
    refused(foreign_json.read, tmp_path / "x.json", "more than")


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "' + "x" * 5000 + '"}}']
    + [
        json.dumps({"weight_map": {"a": name}})
        for name in ("../x.safetensors", "/etc/passwd", "a/b", "c:\\x", "", "..")
    ],
    ids=lambda text: text[:40],
)
def test_an_index_names_files_of_its_folder_and_nothing_else(tmp_path: Path, content: str) -> None:
    (tmp_path.parent / "x.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tensors.read_shards, tmp_path / "model.safetensors.index.json")


def lora_folder(folder: Path, mmdit: MMDiT, **config: object) -> Path:
    folder.mkdir()
    given: Adapter = zero_adapter(mmdit.config, LatentSpec(), rank=2)
    save_file({n: t for n, t in given.lora_state().items() if "alpha" not in n}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, **config}))
    return folder


@pytest.mark.parametrize("pattern", ["(([\\w.]+)+)+!", "(.*)*x", "(", "transformer_blocks.0.(attn|ff)"])
def test_a_pattern_of_a_lora_is_never_run(tmp_path: Path, mmdit: MMDiT, pattern: str) -> None:
    """As a regular expression, the first does not end."""
    folder = lora_folder(tmp_path / "lora", mmdit, alpha_pattern={pattern: 8})
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors.*names of modules, not patterns"):
        lora.read(folder)


def test_a_name_in_alpha_pattern_counts_by_its_end_and_the_first_wins(tmp_path: Path, mmdit: MMDiT) -> None:
    names = {"attn.to_q": 8, "transformer_blocks\\.0\\.attn\\.to_q": 6, "^transformer_blocks.0.attn.to_k$": 4}
    state = lora.read(lora_folder(tmp_path / "lora", mmdit, alpha_pattern=names))
    alphas = {
        name.removesuffix(".alpha")[-4:]: float(state[name]) for name in state if ".0." in name and "alpha" in name
    }
    assert (alphas["to_q"], alphas["to_k"], alphas["to_v"]) == (8, 4, 2)


def test_many_alphas_are_gone_through_once() -> None:
    """2,000 modules and 16,384 patterns took seconds."""

    class Counted(dict[str, float]):
        gone_through = 0

        def __iter__(self) -> Iterator[str]:
            self.gone_through += 1
            return super().__iter__()

    alphas = Counted({"attn.to_q": 8.0})
    scale = lora.LoraScale(alphas=alphas)
    assert [scale.of(f"transformer_blocks.{i}.attn.to_q", 4) for i in range(50)] == [8.0] * 50
    assert alphas.gone_through <= 1


@pytest.mark.parametrize(
    "config", [{"lora_alpha": "2"}, {"lora_alpha": [1]}, {"alpha_pattern": [1]}, {"lora_alpha": True}]
)
def test_a_loras_numbers_are_numbers(tmp_path: Path, mmdit: MMDiT, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="its LoRA configuration cannot be used"):
        lora.read(lora_folder(tmp_path / "lora", mmdit, **config))


# Files that change, and files that are damaged


def test_a_file_that_is_replaced_while_it_is_read_is_named(davae_file: Path, adapter_file: Path) -> None:
    """Any of: the old file, the new one, our error; this gave a RuntimeError of safetensors."""
    versions = [davae_file.read_bytes(), adapter_file.read_bytes(), adapter_file.read_bytes()[:50_000]]
    place, stop = davae_file.with_name("changing.safetensors"), threading.Event()
    place.write_bytes(versions[0])

    def change() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            place.with_suffix(".new").write_bytes(versions[i % 3])
            os.replace(place.with_suffix(".new"), place)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(60):
            for load in (load_autoencoder, load_adapter, inspect.verify):
                try:
                    load(place)
                except CheckpointError as problem:
                    assert place.name in str(problem)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("count", [300, 3000])
def test_a_predictor_of_thousands_of_empty_blocks_is_refused_unbuilt(
    tmp_path: Path, make_davae: Callable[..., DAVAE], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    predictor, davae = DetailPredictor(PredictorConfig(LatentSpec(), 32, 1)), make_davae()
    davae.set_predictor(predictor)
    save_predictor(tmp_path / "p.safetensors", predictor)
    save_autoencoder(tmp_path / "a.safetensors", davae)
    monkeypatch.setattr(DetailPredictor, "__init__", lambda *_: pytest.fail("it was built"))
    for load, name, stem in ((load_predictor, "p", "blocks"), (load_autoencoder, "a", "predictor.blocks")):
        state, info = files.read(tmp_path / f"{name}.safetensors")
        state |= {f"{stem}.{i}.x": torch.zeros(0) for i in range(1, count)}
        save_file(state, tmp_path / "many.safetensors", metadata=info)
        refused(load, tmp_path / "many.safetensors", f"{count} residual blocks, more than")


def test_a_title_that_the_console_cannot_show_is_shown_by_its_numbers(
    adapter_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors_, told = files.read(adapter_file)
    files.save(adapter_file, tensors_, told | {"modelspec.title": "模型"})
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as end:
        command.run(lambda: inspect.main([str(adapter_file)]))
    console.flush()
    assert end.value.code == 0 and b"modelspec.title: \\u6a21" in console.buffer.getvalue()


def flipped(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    return path


def test_damaged_tensors_are_told_by_the_hash(adapter_file: Path) -> None:
    refused(load_adapter, flipped(adapter_file), files.HASH_KEY)


def test_the_hash_of_a_large_file_is_left_to_verify(adapter_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.check_hash, "__defaults__", (1000,))
    flipped(adapter_file)
    load_adapter(adapter_file)
    with pytest.raises(CheckpointError, match=files.HASH_KEY):
        inspect.main([str(adapter_file), "--verify"])


def test_a_half_precision_copy_that_kept_the_metadata_is_no_damage(adapter_file: Path) -> None:
    """Many a script makes one so; the hash in it is of other tensors."""
    state, told = files.read(adapter_file)
    save_file({name: tensor.half() for name, tensor in state.items()}, adapter_file, metadata=told)
    assert load_adapter(adapter_file).state[f"{LORA}.lora_A.weight"].dtype == torch.float16
    assert inspect.verify(adapter_file)[1] == "it holds no hash to compare the data with"


def test_verify_says_what_it_saw(adapter_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.main([str(adapter_file), "--verify"])
    assert "verified: the data is what it was saved with" in capsys.readouterr().out
    shipped = (
        ("vae", tiny.AUTOENCODER),
        ("loras", tiny.ADAPTER),
        ("loras", tiny.FEW_STEPS),
        ("vae_approx", tiny.DECODER),
    )
    for kind, name in shipped:
        assert inspect.verify(tiny.FOLDERS[kind] / name)[1] == "the data is what it was saved with"


# Commands


@pytest.mark.parametrize("lost", ["joint_blocks.1.x_block.mlp.fc2.bias", "pos_embed", "t_embedder.mlp.0.weight"])
def test_an_incomplete_base_is_not_merged(tmp_path: Path, mmdit: MMDiT, adapter_file: Path, lost: str) -> None:
    """What came out was refused by its own loader."""
    state = {name: tensor for name, tensor in mmdit.state_dict().items() if name != lost}
    files.save(tmp_path / "base.safetensors", state, {})
    with pytest.raises(CheckpointError, match=rf"base\.safetensors.*{lost}"):
        merging.main([str(tmp_path / "base.safetensors"), str(adapter_file), str(tmp_path / "out.safetensors")])
    assert not (tmp_path / "out.safetensors").exists()


def test_a_base_that_is_no_number_is_named_when_it_is_merged(tmp_path: Path, mmdit: MMDiT, adapter_file: Path) -> None:
    state = dict(mmdit.state_dict())
    state["joint_blocks.1.x_block.mlp.fc2.bias"] = state["joint_blocks.1.x_block.mlp.fc2.bias"] * float("nan")
    files.save(tmp_path / "base.safetensors", state, {})
    with pytest.raises(
        CheckpointError, match=r"base\.safetensors: the tensor joint_blocks\.1\.x_block\.mlp\.fc2\.bias"
    ):
        merging.main([str(tmp_path / "base.safetensors"), str(adapter_file), str(tmp_path / "out.safetensors")])


def test_an_adapter_that_does_not_fit_the_base_is_named_when_it_is_merged(
    tmp_path: Path, make_mmdit: Callable[..., MMDiT], adapter_file: Path
) -> None:
    """Its message had no file's name."""
    base = make_mmdit(dual_attention=())  # the adapter is for one with dual attention: a wider modulation
    files.save(tmp_path / "base.safetensors", base.state_dict(), {})
    with pytest.raises(DAVAEError, match=rf"{adapter_file.name}: the adapter"):
        merging.main([str(tmp_path / "base.safetensors"), str(adapter_file), str(tmp_path / "out.safetensors")])
    assert not (tmp_path / "out.safetensors").exists()


def test_inspect_shows_what_the_file_says_and_no_defaults(tmp_path: Path, mmdit: MMDiT) -> None:
    spec = LatentSpec(base_shift=0.1159, base_scale=0.3611, detail_mean=(0.5,) * 16)
    save_adapter(tmp_path / "a.safetensors", zero_adapter(mmdit.config, spec))
    told = inspect.describe(tmp_path / "a.safetensors")
    assert told["config"]["latent"]["base_shift"] == 0.1159 and told["config"]["latent"]["detail_mean"] == (0.5,) * 16
    assert told["config"]["recommended"] == {}
    assert inspect.text(told).count("base_shift") == 1


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path: Path, mmdit: MMDiT, adapter_file: Path, mask: int) -> None:
    """safetensors writes files that nobody but their owner may read."""
    files.save(tmp_path / "base.safetensors", mmdit.state_dict(), {})
    before = os.umask(mask)
    try:
        files.save(tmp_path / "saved.safetensors", {"a": torch.zeros(1)}, {})
        convert.main([str(tmp_path / "base.safetensors"), str(tmp_path / "converted.safetensors")])
        convert.main([str(tmp_path / "base.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"])
        merging.main([str(tmp_path / "base.safetensors"), str(adapter_file), str(tmp_path / "merged.safetensors")])
    finally:
        os.umask(before)
    made = [tmp_path / f"{name}.safetensors" for name in ("saved", "converted", "merged")]
    made += [path for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o666 & ~mask}


# FLUX.1


def test_the_vae_of_flux_keeps_its_units_through_every_layout(tmp_path: Path, toy_vae: Any) -> None:
    """Its shapes are SD3's; what tells them apart is said, by the file or the user."""
    vae, folder = tmp_path / "vae.safetensors", tmp_path / "folder"
    files.save(vae, Autoencoder(toy_vae).state_dict(), {})
    convert.main([str(vae), str(tmp_path / "told.safetensors"), "--family", "flux1"])
    assert files.read_metadata(tmp_path / "told.safetensors")[1]["davae.base"] == "flux1"
    convert.main([str(tmp_path / "told.safetensors"), str(folder), "--to", "diffusers"])
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert (config["shift_factor"], config["scaling_factor"]) == (0.1159, 0.3611)
    convert.main([str(folder), str(tmp_path / "back.safetensors")])
    assert files.read_metadata(tmp_path / "back.safetensors")[1]["davae.base"] == "flux1"
    assert open_any(vae).told.get("davae.base") is None
    assert "like SD3 / SD3.5 or FLUX.1's" in open_any(vae).detected.description
    convert.main([str(vae), str(tmp_path / "sd3"), "--to", "diffusers"])
    assert json.loads((tmp_path / "sd3" / "vae" / "config.json").read_text())["shift_factor"] == 0.0609
    with pytest.raises(DAVAEError, match="not that of SDXL"):
        convert.main([str(vae), str(tmp_path / "wrong.safetensors"), "--family", "sdxl"])


def test_a_davae_on_flux_is_exported_with_its_units(tmp_path: Path, make_davae: Callable[..., DAVAE]) -> None:
    davae = make_davae(base_decoder=True)
    davae.set_base_units(0.1159, 0.3611)
    save_autoencoder(tmp_path / "a.safetensors", davae)
    convert.main([str(tmp_path / "a.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"])
    for name in ("base_vae", "detail_vae"):
        config = json.loads((tmp_path / "folder" / name / "config.json").read_text())
        assert (config["shift_factor"], config["scaling_factor"]) == (0.1159, 0.3611)


def test_metadata_that_is_written_is_read(tmp_path: Path, davae: DAVAE) -> None:
    """The ranges are wider than what training writes."""
    davae.set_detail_statistics([1e-3] * 16, [1e-4] * 16)
    save_autoencoder(tmp_path / "a.safetensors", davae, Recommended(size=4096, shift=12, cfg=30, steps=250))
    info = files.read_metadata(tmp_path / "a.safetensors")[1]
    latent, recommended = metadata.latent_of(metadata.parse(info, "autoencoder", "a"), "a")
    assert latent == davae.latent and recommended.steps == 250
