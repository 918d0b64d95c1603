"""Files tell how they were trained and on what: alike in every precision and layout, apart from other models."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from davae_core import tiny
from davae_core.adapter import Adapter, merge, zero_adapter
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import (
    convert,
    files,
    identify,
    inspect,
    load_adapter,
    load_merged,
    metadata,
    save_adapter,
    save_autoencoder,
)
from davae_core.checkpoints import merge as merging
from davae_core.davae import DAVAE
from davae_core.errors import CheckpointError
from davae_core.history import ENOUGH, NAMES, History, compare, fingerprint, identity, mismatch
from davae_core.latent import LatentSpec
from davae_core.mmdit import MMDiT
from davae_core.predictor import DetailPredictor, PredictorConfig

MakeMMDiT = Callable[..., MMDiT]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def trained(model: MMDiT, davae: DAVAE) -> History:
    """The history of an adapter for these two."""
    of = {
        "base_model": identity("base_model", model.state_dict(), "base.safetensors"),
        "davae": identity("davae", davae.state_dict(), "davae.safetensors"),
    }
    return History(40_000, 1e-4, 7, "sd35m_adapter", {"data.size": 1024, "optimiser.lr": 1e-4}, of)


@pytest.fixture
def adapter(mmdit: MMDiT, davae: DAVAE) -> Adapter:
    return replace(zero_adapter(mmdit.config, LatentSpec(), rank=2), history=trained(mmdit, davae))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_a_model_is_the_same_in_any_precision(mmdit: MMDiT, stored: torch.dtype, loaded: torch.dtype) -> None:
    """Also where values are so small that float16 keeps few digits of them."""
    state = {name: tensor * 1e-3 ** (i % 3) for i, (name, tensor) in enumerate(mmdit.state_dict().items())}
    one = fingerprint("base_model", {name: tensor.to(stored) for name, tensor in state.items()})
    other = fingerprint("base_model", {name: tensor.to(stored).to(loaded) for name, tensor in state.items()})
    plain = fingerprint("base_model", state)
    assert len(one) > ENOUGH
    for pair in ((one, other), (plain, one), (plain, other)):
        assert compare(*pair).same and compare(*pair).compared == len(one)


def test_rounding_edges_do_not_matter(mmdit: MMDiT) -> None:
    """A hash of rounded values would break at half of all values that lie at an edge."""
    state = {name: (tensor * 256).round() / 256 + 1 / 512 for name, tensor in mmdit.state_dict().items()}
    for nudge in (-1e-6, 1e-6):
        nudged = {name: tensor + nudge for name, tensor in state.items()}
        assert compare(fingerprint("base_model", state), fingerprint("base_model", nudged)).same


def test_another_model_a_finetune_and_a_merged_lora_are_others(make_mmdit: MakeMMDiT) -> None:
    state = make_mmdit().state_dict()
    torch.manual_seed(1)
    seen = fingerprint("base_model", state)
    finetune = {name: tensor + 0.02 * tensor.std() * torch.randn_like(tensor) for name, tensor in state.items()}
    lora = {name: tensor * 1.1 if name.endswith("attn.qkv.weight") else tensor for name, tensor in state.items()}
    for other in (make_mmdit().state_dict(), finetune, lora):
        assert not compare(seen, fingerprint("base_model", other)).same


def test_an_adapted_model_is_still_known_by_its_trunk(mmdit: MMDiT, adapter: Adapter) -> None:
    wide = merge(mmdit.state_dict(), Adapter(adapter.config, adapter.state))
    assert compare(fingerprint("base_model", wide), fingerprint("base_model", mmdit.state_dict())).same


def test_a_davae_is_told_by_its_encoders_and_tells_its_base_vae(make_davae: Callable[..., DAVAE]) -> None:
    davae, other = make_davae(base_decoder=True), make_davae()
    state = davae.state_dict()
    decoder = {
        name: tensor + 1 if name.startswith(("decoder.", "joint_up.")) else tensor for name, tensor in state.items()
    }
    assert compare(fingerprint("davae", state), fingerprint("davae", decoder)).same
    assert not compare(fingerprint("davae", state), fingerprint("davae", other.state_dict())).same
    detail = {name: tensor + 1 if name.startswith("detail_down.") else tensor for name, tensor in state.items()}
    assert not compare(fingerprint("davae", state), fingerprint("davae", detail)).same
    base = {f"encoder.{name}": tensor for name, tensor in davae.base_encoder.state_dict().items()}
    alone = compare(fingerprint("base_vae", base), fingerprint("base_vae", state))
    assert alone.same and alone.compared == len(fingerprint("base_vae", base)) > ENOUGH


def test_what_is_quantised_is_left_out_and_too_little_tells_nothing(mmdit: MMDiT) -> None:
    state = mmdit.state_dict()
    linear = {n: t.to(torch.float8_e4m3fn) if n.endswith("weight") else t for n, t in state.items()}
    kept = fingerprint("base_model", linear)
    assert (
        0 < len(kept) < len(fingerprint("base_model", state)) and compare(kept, fingerprint("base_model", state)).same
    )
    other = {name: (2.0,) * 4 for name in list(kept)[: ENOUGH - 1]}
    assert compare(kept, other).same
    assert not fingerprint("base_model", {name: tensor.to("meta") for name, tensor in state.items()})


def test_a_file_without_a_history_is_silent(mmdit: MMDiT) -> None:
    assert mismatch(None, "base_model", mmdit.state_dict()) == ""
    assert mismatch(History(), "base_model", mmdit.state_dict()) == ""


def test_the_shipped_files_know_each_other() -> None:
    adapter = load_adapter(tiny.FOLDERS["loras"] / tiny.ADAPTER)
    model, _ = files.read(tiny.FOLDERS["diffusion_models"] / tiny.MODEL)
    davae, info = files.read(tiny.FOLDERS["vae"] / tiny.AUTOENCODER)
    own = metadata.history_of(info, tiny.AUTOENCODER)
    assert adapter.history is not None and own is not None
    for history, role, state in ((adapter.history, "base_model", model), (adapter.history, "davae", davae)):
        assert history.of[role].values and mismatch(history, role, state) == ""
    assert own.of["base_vae"].values and mismatch(own, "base_vae", davae) == ""
    assert "/" not in json.dumps([dict(adapter.history.settings), dict(own.settings)])


def test_a_history_comes_back_from_the_files(tmp_path: Path, adapter: Adapter, davae: DAVAE) -> None:
    save_adapter(tmp_path / "a.safetensors", adapter)
    assert load_adapter(tmp_path / "a.safetensors").history == adapter.history
    save_autoencoder(tmp_path / "v.safetensors", davae, history=adapter.history)
    info = files.read_metadata(tmp_path / "v.safetensors")[1]
    assert metadata.history_of(info, "v") == adapter.history


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"seed": true}',
        '{"of": {"davae": 3}}',
        '{"steps": NaN}',
        '{"steps": "9", "learning_rate": 0, "seed": 0, "recipe": "", "of": {}}',
        "null",
    ],
)
def test_a_damaged_history_is_named(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: the history in its metadata is damaged"):
        metadata.history_of({metadata.HISTORY: text}, "x.safetensors")


def test_merging_and_exporting_keep_it(tmp_path: Path, mmdit: MMDiT, adapter: Adapter, capsys) -> None:
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    files.save(base, mmdit.state_dict(), {})
    save_adapter(tmp_path / "a.safetensors", adapter)
    merging.main([str(base), str(tmp_path / "a.safetensors"), str(merged)])
    assert "trained on" not in capsys.readouterr().out
    assert load_merged(merged).history == adapter.history
    convert.main([str(merged), str(tmp_path / "folder"), "--to", "diffusers"])
    convert.main([str(tmp_path / "folder"), str(tmp_path / "back.safetensors")])
    assert load_merged(tmp_path / "back.safetensors").history == adapter.history
    assert compare(
        identify(tmp_path / "folder", "base_model").values, identify(base, "base_model").values
    ).same  # diffusers' layout


def test_merging_with_another_base_says_so(tmp_path: Path, make_mmdit: MakeMMDiT, adapter: Adapter, capsys) -> None:
    files.save(tmp_path / "other.safetensors", make_mmdit().state_dict(), {})
    save_adapter(tmp_path / "a.safetensors", adapter)
    merging.main([str(tmp_path / name) for name in ("other.safetensors", "a.safetensors", "m.safetensors")])
    assert "a.safetensors was trained on base.safetensors, this is another" in capsys.readouterr().out


def test_inspect_tells_it_without_the_values(tmp_path: Path, adapter: Adapter) -> None:
    save_adapter(tmp_path / "a.safetensors", adapter)
    told = inspect.describe(tmp_path / "a.safetensors")
    text = inspect.text(told)
    for line in ("steps: 40000", 'recipe: "sd35m_adapter"', "base_model: base.safetensors", "data.size: 1024"):
        assert f"    {line}" in text.splitlines(), line
    assert "qkv" not in text and "qkv" in json.dumps(told)


def test_files_of_any_layout_are_identified(tmp_path: Path, mmdit: MMDiT, davae: DAVAE, toy_vae) -> None:
    vae = Autoencoder(toy_vae).state_dict()
    whole = {f"model.diffusion_model.{name}": tensor.half() for name, tensor in mmdit.state_dict().items()}
    whole |= {f"first_stage_model.{name}": tensor.half() for name, tensor in vae.items()}
    files.save(tmp_path / "whole.safetensors", whole, {})
    save_autoencoder(tmp_path / "davae.safetensors", davae)
    for role, file, state in (
        ("base_model", "whole", mmdit.state_dict()),
        ("base_vae", "whole", vae),
        ("base_vae", "davae", davae.state_dict()),
        ("davae", "davae", davae.state_dict()),
    ):
        found = identify(tmp_path / f"{file}.safetensors", role)
        assert found.name == f"{file}.safetensors" and compare(found.values, fingerprint(role, state)).same
    assert identify(tmp_path / "whole.safetensors", "start").values == {}
    with pytest.raises(CheckpointError, match="cannot be the davae"):
        identify(tmp_path / "whole.safetensors", "davae")


def test_every_name_is_one_of_the_layout(mmdit: MMDiT, make_davae: Callable[..., DAVAE]) -> None:
    """A name with a slip would never be compared."""
    config = replace(mmdit.config, depth=38, hidden=64, dual_attention=())
    with torch.device("meta"):
        model = set(MMDiT(config).state_dict())
    assert set(NAMES["base_model"]) <= model
    wide = AutoencoderConfig(widths=(32,) * 5, blocks=1, quant_conv=True)
    inside = make_davae(base=wide, shared_trunk=False, detail=48)
    inside.set_predictor(DetailPredictor(PredictorConfig(inside.latent, width=32, blocks=1)))
    davae = inside.state_dict()
    ours = {name.replace("base_encoder.", "encoder.").replace("base_quant", "quant") for name in davae}
    never = {name for name in NAMES["davae"] if name not in ours}
    assert never <= {"detail_down.shortcut.weight", "detail_trunk.conv_out.weight", "detail_trunk.conv_out.bias"}


def test_it_reads_few_tensors_and_copies_none(make_mmdit: MakeMMDiT) -> None:
    """So that it costs milliseconds at full size."""

    class Counted(dict):
        read = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            Counted.read += 1
            return super().__getitem__(name)

    state = Counted(make_mmdit(depth=24, hidden=64).state_dict())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        values = fingerprint("base_model", state)
    assert Counted.read == len(values) <= 48
    assert max(event.cpu_memory_usage for event in seen.key_averages()) < 64 * 2**10
