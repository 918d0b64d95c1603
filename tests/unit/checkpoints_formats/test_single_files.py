"""SD3.5 in one file, its parts, merging, and what the inspector says of each."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from davae_core.adapter import Adapter, merge, zero_adapter
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import files, inspect, load_adapter, load_merged, save_adapter, save_autoencoder, tensors
from davae_core.checkpoints import merge as merging
from davae_core.davae import DAVAE
from davae_core.errors import DAVAEError
from davae_core.latent import LatentSpec
from davae_core.lora import LORA_MODULES
from davae_core.mmdit import MMDiT

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def parts(make_mmdit: Callable[..., MMDiT]) -> dict[str, State]:
    """The models of a checkpoint, by the names under which convert writes them."""
    return {
        "diffusion_model": make_mmdit(depth=3, grid=8).state_dict(),
        "vae": Autoencoder(AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1)).state_dict(),
        "clip_l": {"text_model.embeddings.token_embedding.weight": torch.randn(4, 8), "logit_scale": torch.ones(())},
        "t5xxl": {"shared.weight": torch.randn(6, 4)},
    }


def whole(parts: dict[str, State], text: bool = True) -> State:
    """The same in one file, as Stability AI and ComfyUI write it."""
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in parts["diffusion_model"].items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in parts["vae"].items()}
    if text:
        inner = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight"
        state[inner] = parts["clip_l"]["text_model.embeddings.token_embedding.weight"]
        state["text_encoders.clip_l.logit_scale"] = parts["clip_l"]["logit_scale"]
        state["text_encoders.t5xxl.transformer.shared.weight"] = parts["t5xxl"]["shared.weight"]
    return state


def assert_same(ours: State, wanted: State) -> None:
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("text", [True, False])
def test_a_checkpoint_falls_into_its_models(tmp_path: Path, run, parts: dict[str, State], text: bool) -> None:
    files.save(tmp_path / "sd35.safetensors", whole(parts, text), {})
    written = run(tmp_path / "sd35.safetensors", tmp_path / "out")
    names = ["diffusion_model", "vae", *(["clip_l", "t5xxl"] if text else [])]
    assert [path.stem for path in written] == names
    for path in written:
        assert_same(files.read(path)[0], parts[path.stem])


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_bare_diffusion_model_is_read_with_and_without_a_prefix(
    tmp_path: Path, run, parts: dict[str, State], prefix: str
) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in parts["diffusion_model"].items()}
    files.save(tmp_path / "bare.safetensors", state, {})
    (path,) = run(tmp_path / "bare.safetensors", tmp_path / "x.safetensors")
    assert_same(files.read(path)[0], parts["diffusion_model"])


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_alone_is_read_with_and_without_a_prefix(
    tmp_path: Path, run, parts: dict[str, State], prefix: str
) -> None:
    files.save(tmp_path / "v.safetensors", {f"{prefix}{name}": t for name, t in parts["vae"].items()}, {})
    (path,) = run(tmp_path / "v.safetensors", tmp_path / "x.safetensors")
    assert_same(files.read(path)[0], parts["vae"])


# Tensor by tensor


def test_a_file_written_tensor_by_tensor_is_the_same_as_one_written_at_once(tmp_path: Path) -> None:
    state = {
        "b": torch.randn(3, 2).bfloat16(),
        "scalar": torch.tensor(2.0),
        "long": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "across": torch.randn(4, 3).T,
        "none": torch.zeros(0, 3),
    }
    tensors.write(tmp_path / "a.safetensors", tensors.in_memory(state), {"key": 'a "quoted" ü'})
    loaded, told = files.read(tmp_path / "a.safetensors")
    assert_same(loaded, state)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {n: t.dtype for n, t in state.items()}
    assert (
        told["key"] == 'a "quoted" ü' and len(told[files.HASH_KEY]) == 66 and told[files.HASH_KEY] != files.HASH_BLANK
    )
    lazily, _ = tensors.read(tmp_path / "a.safetensors")
    assert_same(dict(lazily), state)


def test_no_two_tensors_are_held_at_once(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def make(name: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.full((100,), float(name))
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    meta = {str(i): torch.empty(100, device="meta") for i in range(20)}
    tensors.write(tmp_path / "x.safetensors", tensors.Tensors(meta, make), {})
    assert len(alive) == 20 and most <= 2  # the last is dropped when the next is there


# Merging


def make_adapter(model: MMDiT) -> Adapter:
    made = zero_adapter(model.config, LatentSpec(), rank=3, targets=tuple(LORA_MODULES))
    for name, tensor in made.state.items():
        torch.nn.init.normal_(tensor, std=0.05) if not name.endswith(".alpha") else tensor.fill_(2.0)
    return made


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_merge_command_gives_what_merging_in_memory_gives(
    tmp_path: Path, make_mmdit: Callable[..., MMDiT], parts: dict[str, State], strength: float
) -> None:
    base = make_mmdit(depth=3, grid=8).bfloat16()
    adapter = make_adapter(base)
    files.save(tmp_path / "base.safetensors", whole({**parts, "diffusion_model": base.state_dict()}), {})
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    out = tmp_path / "merged.safetensors"
    paths = [str(tmp_path / "base.safetensors"), str(tmp_path / "adapter.safetensors"), str(out)]
    merging.main([*paths, "--strength", str(strength), "--title", "Mine"])
    merged = load_merged(out)
    assert merged.latent == adapter.config.latent
    wanted = merge(base.state_dict(), load_adapter(tmp_path / "adapter.safetensors"), strength)
    assert_same(merged.state, wanted)
    assert files.read_metadata(out)[1]["modelspec.title"] == "Mine"


def test_merging_into_another_model_is_refused(tmp_path: Path, make_mmdit: Callable[..., MMDiT]) -> None:
    save_adapter(tmp_path / "adapter.safetensors", make_adapter(make_mmdit(depth=3, grid=8)))
    for name, other in (("narrow", {"hidden": 64}), ("shallow", {"depth": 1})):
        files.save(tmp_path / f"{name}.safetensors", make_mmdit(grid=8, **other).state_dict(), {})
        with pytest.raises(DAVAEError, match="use the model it was trained for"):
            merging.main([str(tmp_path / n) for n in (f"{name}.safetensors", "adapter.safetensors", "out.safetensors")])
    assert not (tmp_path / "out.safetensors").exists()


# What the inspector says


def test_the_inspector_names_kind_shapes_dtype_and_size(
    tmp_path: Path, parts: dict[str, State], make_davae: Callable[..., DAVAE], capsys: pytest.CaptureFixture[str]
) -> None:
    files.save(tmp_path / "sd35.safetensors", whole(parts), {"modelspec.title": "Toy"})
    told = inspect.main([str(tmp_path / "sd35.safetensors"), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(told))
    assert told["kind"] == "sd3 checkpoint" and told["metadata"]["modelspec.title"] == "Toy"
    assert list(told["parts"]) == ["diffusion_model", "vae", "clip_l", "t5xxl"]
    model = told["parts"]["diffusion_model"]
    assert model["config"]["hidden"] == 128 and model["config"]["dual_attention"] == (0,)
    assert model["parameters"] == sum(tensor.numel() for tensor in parts["diffusion_model"].values())
    assert model["bytes"] == 4 * model["parameters"] and model["dtypes"] == ["float32"]
    assert told["parts"]["vae"]["config"]["latent_channels"] == 16

    save_autoencoder(tmp_path / "a.safetensors", make_davae().bfloat16())
    told = inspect.main([str(tmp_path / "a.safetensors")])
    said = capsys.readouterr().out
    assert "a DA-VAE autoencoder" in said and "bfloat16" in said and '"detail_channels": 16' in said
    assert told["config"]["shared_trunk"] and told["metadata"]["davae.config"]["latent"]["scale"] == 2


def test_the_inspector_says_what_a_damaged_adapter_lacks(tmp_path: Path, mmdit: MMDiT) -> None:
    adapter = make_adapter(mmdit)
    state = {name: tensor for name, tensor in adapter.state.items() if not name.endswith("linear.detail.bias")}
    save_adapter(tmp_path / "a.safetensors", replace(adapter, state=state))
    assert "detail.bias" in inspect.describe(tmp_path / "a.safetensors")["config"]["problem"]
