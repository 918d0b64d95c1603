"""From C to C + D channels: step 0 changes nothing, and each trained part changes what it names and nothing else."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from davae_core.adapter import PAPER_TARGETS, WIDENED, Adapter, AdapterConfig, Recommended, merge, widen, zero_adapter
from davae_core.errors import CheckpointError, DAVAEError
from davae_core.latent import LatentSpec
from davae_core.lora import LORA_MODULES, lora_deltas
from davae_core.mmdit import MMDiT, MMDiTConfig

MakeMmdit = Callable[..., MMDiT]
Run = Callable[..., torch.Tensor]
State = dict[str, torch.Tensor]

EMBED_DETAIL = "davae.x_embedder.proj.detail.weight"
HEAD_DETAIL = "davae.final_layer.linear.detail."
HIDDEN = 128

# The weight of the SD3.5 layout that diffusers' name stands for, and its rows: query, key and value are fused.
Q, K, V = slice(0, HIDDEN), slice(HIDDEN, 2 * HIDDEN), slice(2 * HIDDEN, 3 * HIDDEN)
WHOLE = slice(None)
NAMED_ROWS = {
    "attn.to_q": ("x_block.attn.qkv", Q),
    "attn.to_k": ("x_block.attn.qkv", K),
    "attn.to_v": ("x_block.attn.qkv", V),
    "attn.to_out.0": ("x_block.attn.proj", WHOLE),
    "attn2.to_q": ("x_block.attn2.qkv", Q),
    "attn2.to_k": ("x_block.attn2.qkv", K),
    "attn2.to_v": ("x_block.attn2.qkv", V),
    "attn2.to_out.0": ("x_block.attn2.proj", WHOLE),
    "attn.add_q_proj": ("context_block.attn.qkv", Q),
    "attn.add_k_proj": ("context_block.attn.qkv", K),
    "attn.add_v_proj": ("context_block.attn.qkv", V),
    "attn.to_add_out": ("context_block.attn.proj", WHOLE),
    "ff.net.0.proj": ("x_block.mlp.fc1", WHOLE),
    "ff.net.2": ("x_block.mlp.fc2", WHOLE),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", WHOLE),
    "ff_context.net.2": ("context_block.mlp.fc2", WHOLE),
    "norm1.linear": ("x_block.adaLN_modulation.1", WHOLE),
}


def lora_name(block: int, module: str) -> str:
    return f"transformer.transformer_blocks.{block}.{module}"


def randomise(adapter: Adapter, *parts: str, std: float = 0.05) -> Adapter:
    """The adapter with random numbers in the tensors whose names hold one of ``parts`` (all of them if none)."""
    state = {
        name: torch.randn_like(tensor) * std
        if not name.endswith("alpha") and (not parts or any(part in name for part in parts))
        else tensor.clone()
        for name, tensor in adapter.state.items()
    }
    return replace(adapter, state=state)


def lora(model: MMDiTConfig, block: int, module: str, rank: int, rows: int, columns: int) -> Adapter:
    """An adapter whose only change is one random LoRA."""
    adapter = zero_adapter(model, LatentSpec())
    added = {
        f"{lora_name(block, module)}.lora_A.weight": torch.randn(rank, columns),
        f"{lora_name(block, module)}.lora_B.weight": torch.randn(rows, rank) * 0.1,
    }
    return replace(adapter, state=adapter.state | added)


# Step 0


@pytest.mark.parametrize("detail", [16, 48])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("filling", [0.0, 1.0, 1e4])
def test_step_zero_predicts_what_the_base_model_predicts(
    mmdit: MMDiT, run_state: Run, detail: int, rank: int, filling: float
) -> None:
    base = mmdit.state_dict()
    merged = merge(base, zero_adapter(mmdit.config, LatentSpec(detail_channels=detail), rank))
    z_base = torch.randn(2, 16, 5, 6)
    z = torch.cat([z_base, filling * torch.randn(2, detail, 5, 6)], dim=1)
    v = run_state(merged, z)
    assert v.shape == z.shape
    assert (v[:, :16] - run_state(base, z_base)).abs().max() <= 1e-5
    assert v[:, 16:].abs().max() == 0


def test_step_zero_leaves_every_other_tensor_as_it_was(mmdit: MMDiT) -> None:
    base = mmdit.state_dict()
    merged = merge(base, zero_adapter(mmdit.config, LatentSpec(), rank=4))
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], base[name]) for name in base if name not in WIDENED)


def test_merged_tensors_are_those_of_a_model_of_all_channels(mmdit: MMDiT) -> None:
    merged = merge(mmdit.state_dict(), randomise(zero_adapter(mmdit.config, LatentSpec(detail_channels=48), rank=2)))
    expected = replace(mmdit.config, in_channels=64, out_channels=64)
    assert MMDiTConfig.from_state_dict(merged) == expected
    MMDiT(expected).load_state_dict(merged)


def test_detail_channels_count_once_their_embedder_is_not_zero(mmdit: MMDiT, run_state: Run) -> None:
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec()), "x_embedder.proj.detail")
    merged = merge(mmdit.state_dict(), adapter)
    z = torch.randn(1, 32, 4, 4)
    empty = torch.cat([z[:, :16], torch.zeros(1, 16, 4, 4)], dim=1)
    assert (run_state(merged, z) - run_state(merged, empty))[:, :16].abs().max() > 1e-3
    assert (run_state(merged, empty)[:, :16] - run_state(mmdit.state_dict(), z[:, :16])).abs().max() <= 1e-5


def test_a_new_head_predicts_detail_and_leaves_the_base_alone(mmdit: MMDiT, run_state: Run) -> None:
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec()), "final_layer.linear.detail")
    z = torch.randn(1, 32, 4, 4)
    v = run_state(merge(mmdit.state_dict(), adapter), z)
    assert (v[:, :16] - run_state(mmdit.state_dict(), z[:, :16])).abs().max() <= 1e-5
    assert v[:, 16:].abs().max() > 1e-2


# The wider embedder and head


@pytest.mark.parametrize(("patch", "detail"), [(2, 16), (2, 48), (1, 32)])
def test_head_rows_are_token_position_then_base_then_detail(make_mmdit: MakeMmdit, patch: int, detail: int) -> None:
    model = make_mmdit(patch=patch)
    adapter = randomise(zero_adapter(model.config, LatentSpec(detail_channels=detail)), "final_layer")
    wide = widen(model.state_dict(), adapter)
    for part in ("weight", "bias"):
        base = (
            model.state_dict()[f"final_layer.linear.{part}"] + adapter.state[f"davae.final_layer.linear.delta.{part}"]
        )
        new = adapter.state[f"{HEAD_DETAIL}{part}"]
        rows = wide[f"final_layer.linear.{part}"]
        assert rows.shape[0] == patch**2 * (16 + detail)
        for position in range(patch**2):
            for channel in range(16 + detail):
                source = base[position * 16 + channel] if channel < 16 else new[position * detail + channel - 16]
                assert torch.equal(rows[position * (16 + detail) + channel], source)


def test_head_of_detail_writes_its_rows_to_their_pixels(mmdit: MMDiT, run_state: Run) -> None:
    adapter = zero_adapter(mmdit.config, LatentSpec())
    adapter.state[f"{HEAD_DETAIL}bias"].copy_(torch.arange(64.0))
    v = run_state(merge(mmdit.state_dict(), adapter), torch.randn(1, 32, 4, 4))
    for channel in range(16):
        for y in range(4):
            for x in range(4):
                assert v[0, 16 + channel, y, x] == (y % 2 * 2 + x % 2) * 16 + channel


def test_embedders_are_added(mmdit: MMDiT) -> None:
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec(detail_channels=32)))
    wide = widen(mmdit.state_dict(), adapter)
    z = torch.randn(2, 48, 4, 6)

    def embed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, bias, stride=2)

    changed = {part: adapter.state[f"davae.x_embedder.proj.delta.{part}"] for part in ("weight", "bias")}
    expected = (
        mmdit.x_embedder.proj(z[:, :16])
        + embed(z[:, :16], changed["weight"], changed["bias"])
        + embed(z[:, 16:], adapter.state[EMBED_DETAIL])
    )
    assert torch.allclose(embed(z, wide[WIDENED[0]], wide[WIDENED[1]]), expected, atol=1e-5)


def test_changes_of_embedder_and_head_may_be_left_out(mmdit: MMDiT) -> None:
    full = randomise(zero_adapter(mmdit.config, LatentSpec()), "detail")
    short = replace(full, state={name: tensor for name, tensor in full.state.items() if ".delta." not in name})
    wide, expected = widen(mmdit.state_dict(), short), widen(mmdit.state_dict(), full)
    assert all(torch.equal(wide[name], expected[name]) for name in WIDENED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wider_tensors_take_the_models_dtype(mmdit: MMDiT, dtype: torch.dtype) -> None:
    base = {name: tensor.to(dtype) for name, tensor in mmdit.state_dict().items()}
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec(), rank=4))
    merged = merge(base, adapter)
    exact = merge({name: tensor.float() for name, tensor in base.items()}, adapter)
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    for name in merged:  # worked out in float32 and rounded once
        assert torch.equal(merged[name], exact[name].to(dtype)), name


# LoRA


def test_the_table_knows_every_module_we_claim() -> None:
    assert LORA_MODULES.keys() == NAMED_ROWS.keys()
    assert set(PAPER_TARGETS) <= NAMED_ROWS.keys()


@pytest.mark.parametrize("module", NAMED_ROWS)
def test_lora_merges_into_exactly_the_rows_it_names(mmdit: MMDiT, run_state: Run, module: str) -> None:
    base = mmdit.state_dict()
    weight, rows = NAMED_ROWS[module]
    name = f"joint_blocks.0.{weight}.weight"
    height, columns = base[name][rows].shape
    adapter = lora(mmdit.config, 0, module, 3, height, columns)
    by_hand = {key: tensor.clone() for key, tensor in base.items()}
    by_hand[name][rows] += (
        adapter.state[f"{lora_name(0, module)}.lora_B.weight"] @ adapter.state[f"{lora_name(0, module)}.lora_A.weight"]
    )
    merged = merge(base, adapter)
    differing = [key for key in base if key not in WIDENED and not torch.equal(merged[key], base[key])]
    assert differing == [name]
    assert torch.allclose(merged[name], by_hand[name], atol=1e-6)
    z = torch.randn(1, 32, 4, 4)
    v = run_state(merged, z)[:, :16]
    assert (v - run_state(by_hand, z[:, :16])).abs().max() <= 1e-5
    assert (v - run_state(base, z[:, :16])).abs().max() > 1e-4


def test_lora_of_query_key_and_value_add_up_in_one_weight(mmdit: MMDiT) -> None:
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec(), 2, ("attn.to_q", "attn.to_k", "attn.to_v")), "lora")
    name = "joint_blocks.1.x_block.attn.qkv.weight"
    products = [
        adapter.state[f"{lora_name(1, module)}.lora_B.weight"] @ adapter.state[f"{lora_name(1, module)}.lora_A.weight"]
        for module in ("attn.to_q", "attn.to_k", "attn.to_v")
    ]
    change = merge(mmdit.state_dict(), adapter)[name] - mmdit.state_dict()[name]
    assert torch.allclose(change, torch.cat(products), atol=1e-6)


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (4.0, 1.0), (8.0, 2.0), (1.0, 0.25)])
def test_alpha_over_rank_scales_a_lora(toy_mmdit: MMDiTConfig, alpha: float | None, factor: float) -> None:
    adapter = lora(toy_mmdit, 1, "ff.net.2", 4, HIDDEN, 4 * HIDDEN)
    stem = lora_name(1, "ff.net.2")
    if alpha is not None:
        adapter.state[f"{stem}.alpha"] = torch.tensor(alpha)
    ((name, third, delta),) = lora_deltas(adapter.state)
    assert (name, third) == ("joint_blocks.1.x_block.mlp.fc2.weight", None)
    expected = factor * adapter.state[f"{stem}.lora_B.weight"] @ adapter.state[f"{stem}.lora_A.weight"]
    assert torch.allclose(delta, expected, atol=1e-6)


def test_half_precision_factors_are_multiplied_in_float32(toy_mmdit: MMDiTConfig) -> None:
    adapter = lora(toy_mmdit, 0, "attn.to_q", 64, HIDDEN, HIDDEN)
    half = replace(adapter, state={name: tensor.bfloat16() for name, tensor in adapter.state.items()})
    ((_, _, delta),) = lora_deltas(half.state)
    stem = lora_name(0, "attn.to_q")
    up, down = (half.state[f"{stem}.lora_{side}.weight"].float() for side in "BA")
    assert delta.dtype == torch.float32
    assert torch.allclose(delta, up @ down, atol=1e-6)


def test_lora_state_is_the_lora_and_nothing_of_ours(toy_mmdit: MMDiTConfig) -> None:
    names = zero_adapter(toy_mmdit, LatentSpec(), rank=2).lora_state()
    assert names and all(name.startswith("transformer.transformer_blocks.") for name in names)
    assert zero_adapter(toy_mmdit, LatentSpec()).lora_state() == {}


def test_paper_targets_give_lora_in_every_block(toy_mmdit: MMDiTConfig) -> None:
    adapter = zero_adapter(toy_mmdit, LatentSpec(), rank=4)
    named = {name.removesuffix(".lora_A.weight") for name in adapter.lora_state() if name.endswith("lora_A.weight")}
    assert named == {lora_name(block, module) for block in range(2) for module in PAPER_TARGETS}


def test_second_attention_gets_lora_only_where_it_exists(mmdit: MMDiT) -> None:
    adapter = zero_adapter(mmdit.config, LatentSpec(), rank=4, targets=("attn2.to_q",))
    assert any(name.startswith("transformer.transformer_blocks.0.attn2") for name in adapter.state)
    assert not any(name.startswith("transformer.transformer_blocks.1.attn2") for name in adapter.state)
    merge(mmdit.state_dict(), adapter)


def test_first_factors_follow_the_generator_and_second_ones_are_zero(toy_mmdit: MMDiTConfig) -> None:
    def draw(seed: int) -> State:
        return zero_adapter(toy_mmdit, LatentSpec(), 4, generator=torch.Generator().manual_seed(seed)).lora_state()

    one, again, other = draw(1), draw(1), draw(2)
    for name in one:
        assert torch.equal(one[name], again[name])
        if name.endswith("lora_A.weight"):
            assert not torch.equal(one[name], other[name])
            assert one[name].std() == pytest.approx(1 / one[name].shape[0], rel=0.2)
        elif name.endswith("lora_B.weight"):
            assert one[name].abs().max() == 0
        else:
            assert one[name] == 4


@pytest.mark.parametrize("module", ["attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"])
def test_every_target_gives_an_adapter_that_fits_its_model(mmdit: MMDiT, module: str) -> None:
    merge(mmdit.state_dict(), zero_adapter(mmdit.config, LatentSpec(), rank=4, targets=(module,)))


# Strength


def test_strength_scales_changes_of_the_pretrained_weights(mmdit: MMDiT) -> None:
    base = mmdit.state_dict()
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec(), rank=4))
    full, half, none = (merge(base, adapter, strength) for strength in (1.0, 0.5, 0.0))
    changed = [name for name in base if name not in WIDENED and not torch.equal(full[name], base[name])]
    assert changed
    for name in changed:
        assert torch.equal(none[name], base[name])
        assert torch.allclose(half[name] - base[name], (full[name] - base[name]) / 2, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_new_embedder_and_head_always_count_in_full(mmdit: MMDiT, strength: float) -> None:
    base = mmdit.state_dict()
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec()))
    wide = widen(base, adapter, strength)
    embedder, head = wide["x_embedder.proj.weight"], wide["final_layer.linear.weight"].unflatten(0, (4, 32))
    assert torch.equal(embedder[:, 16:], adapter.state[EMBED_DETAIL])
    assert torch.equal(head[:, 16:].flatten(0, 1), adapter.state[f"{HEAD_DETAIL}weight"])
    for name, part in (("x_embedder.proj.", embedder[:, :16]), ("final_layer.linear.", head[:, :16].flatten(0, 1))):
        expected = base[f"{name}weight"] + strength * adapter.state[f"davae.{name}delta.weight"]
        assert torch.allclose(part, expected, atol=1e-6)


# What merging must not do


def test_merging_changes_no_base_tensor_and_shares_those_it_leaves_alone(mmdit: MMDiT) -> None:
    base = mmdit.state_dict()
    before = {name: tensor.clone() for name, tensor in base.items()}
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec(), rank=4))
    given = {name: tensor.clone() for name, tensor in adapter.state.items()}
    merged = merge(base, adapter)
    assert all(torch.equal(base[name], before[name]) for name in before)
    assert all(torch.equal(adapter.state[name], given[name]) for name in given)
    for name in base:
        shared = merged[name].data_ptr() == base[name].data_ptr()
        assert shared == (name not in WIDENED and torch.equal(merged[name], base[name])), name


def test_base_tensors_in_any_memory_layout_give_the_same(mmdit: MMDiT) -> None:
    base = mmdit.state_dict()
    strided = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in base.items()}
    assert not strided["joint_blocks.0.x_block.attn.qkv.weight"].is_contiguous()
    adapter = randomise(zero_adapter(mmdit.config, LatentSpec(), rank=4))
    expected, merged = merge(base, adapter), merge(strided, adapter)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


# What does not fit


def test_unknown_lora_name_is_refused_by_name(mmdit: MMDiT) -> None:
    for name in (
        "transformer.transformer_blocks.0.attn.to_nowhere.lora_A.weight",
        "lora_unet_joint_blocks_0_attn.lora_down.weight",
        "transformer.transformer_blocks.x.attn.to_q.lora_A.weight",
    ):
        adapter = zero_adapter(mmdit.config, LatentSpec())
        adapter.state[name] = torch.zeros(2, HIDDEN)
        with pytest.raises(CheckpointError, match=f"unknown LoRA tensor: {name}"):
            merge(mmdit.state_dict(), adapter)


def test_unknown_target_is_refused_with_the_known_ones(toy_mmdit: MMDiTConfig) -> None:
    with pytest.raises(DAVAEError, match=r"unknown LoRA module 'attn.qkv', expected one of attn.to_q, .*norm1.linear"):
        zero_adapter(toy_mmdit, LatentSpec(), rank=4, targets=("attn.qkv",))


def test_another_width_is_refused_with_both_widths(mmdit: MMDiT, make_mmdit: MakeMmdit) -> None:
    other = make_mmdit(hidden=64)
    with pytest.raises(DAVAEError, match=r"width 64 .* MODEL has width 128 .*use the model it was trained for"):
        merge(mmdit.state_dict(), zero_adapter(other.config, LatentSpec()))


def test_another_patch_is_refused(mmdit: MMDiT, make_mmdit: MakeMmdit) -> None:
    with pytest.raises(DAVAEError, match=r"patches of 1,.* patches of 2"):
        merge(mmdit.state_dict(), zero_adapter(make_mmdit(patch=1).config, LatentSpec()))


def test_a_model_that_is_already_adapted_is_refused_with_its_channels(mmdit: MMDiT) -> None:
    adapter = zero_adapter(mmdit.config, LatentSpec())
    merged = merge(mmdit.state_dict(), adapter)
    with pytest.raises(DAVAEError, match=r"16 latent channels, .* reads 32 and predicts 32; use an unadapted model"):
        merge(merged, adapter)


def test_a_model_whose_head_alone_has_other_channels_is_refused(make_mmdit: MakeMmdit) -> None:
    model = make_mmdit(out_channels=32)
    with pytest.raises(DAVAEError, match="reads 16 and predicts 32"):
        merge(model.state_dict(), zero_adapter(replace(model.config, out_channels=16), LatentSpec()))


@pytest.mark.parametrize("channels", [(4, 16), (16, 4)])
def test_step_zero_is_refused_for_a_latent_that_is_not_the_models(
    toy_mmdit: MMDiTConfig, channels: tuple[int, int]
) -> None:
    model = replace(toy_mmdit, in_channels=channels[0], out_channels=channels[1])
    with pytest.raises(DAVAEError, match=rf"{channels[0]} channels in and {channels[1]} out, .* 16 base channels"):
        zero_adapter(model, LatentSpec())


def test_lora_of_a_layer_the_model_lacks_is_refused_by_name(mmdit: MMDiT) -> None:
    for block, module, name in (
        (7, "attn.to_q", "joint_blocks.7.x_block.attn.qkv.weight"),
        (1, "attn2.to_q", "joint_blocks.1.x_block.attn2.qkv.weight"),
    ):
        adapter = lora(mmdit.config, block, module, 2, HIDDEN, HIDDEN)
        with pytest.raises(DAVAEError, match=f"changes {name}, which the model does not have"):
            merge(mmdit.state_dict(), adapter)


def test_lora_of_another_size_is_refused_with_both_sizes(mmdit: MMDiT) -> None:
    adapter = lora(mmdit.config, 0, "attn.to_q", 2, 64, HIDDEN)
    with pytest.raises(DAVAEError, match=r"qkv.weight is \[64, 128\], expected \[128, 128\]"):
        merge(mmdit.state_dict(), adapter)


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_half_a_lora_is_refused_by_name(mmdit: MMDiT, lost: str) -> None:
    adapter = lora(mmdit.config, 0, "attn.to_q", 2, HIDDEN, HIDDEN)
    del adapter.state[f"{lora_name(0, 'attn.to_q')}.{lost}.weight"]
    with pytest.raises(CheckpointError, match=lora_name(0, "attn.to_q")):
        merge(mmdit.state_dict(), adapter)


# Reading an adapter's shapes


@pytest.mark.parametrize(("detail", "patch"), [(16, 2), (48, 2), (32, 1)])
def test_shapes_tell_what_an_adapter_fits(toy_mmdit: MMDiTConfig, detail: int, patch: int) -> None:
    latent = LatentSpec(detail_channels=detail)
    adapter = zero_adapter(replace(toy_mmdit, patch=patch), latent, rank=2)
    assert AdapterConfig.from_state_dict(adapter.state) == AdapterConfig(latent, HIDDEN, patch, Recommended())


def test_shapes_tell_the_base_channels_of_an_adapter_with_a_change_of_the_embedder(toy_mmdit: MMDiTConfig) -> None:
    latent = LatentSpec(base_channels=4, detail_channels=12, base_shift=0.0, base_scale=1.0)
    adapter = zero_adapter(replace(toy_mmdit, in_channels=4, out_channels=4), latent)
    told = AdapterConfig.from_state_dict(adapter.state).latent
    assert (told.base_channels, told.detail_channels) == (4, 12)


@pytest.mark.parametrize(
    "missing",
    [EMBED_DETAIL, f"{HEAD_DETAIL}weight", f"{HEAD_DETAIL}bias"],
)
def test_an_adapter_without_its_new_layers_is_refused_by_name(toy_mmdit: MMDiTConfig, missing: str) -> None:
    state = zero_adapter(toy_mmdit, LatentSpec()).state
    del state[missing]
    with pytest.raises(CheckpointError, match=missing):
        AdapterConfig.from_state_dict(state)


def test_an_adapter_whose_embedder_and_head_disagree_is_refused(toy_mmdit: MMDiTConfig) -> None:
    state = zero_adapter(toy_mmdit, LatentSpec()).state
    state |= {f"{HEAD_DETAIL}weight": torch.zeros(4 * 32, HIDDEN), f"{HEAD_DETAIL}bias": torch.zeros(4 * 32)}
    with pytest.raises(CheckpointError, match="embedder is for 16 detail channels, its head for 32"):
        AdapterConfig.from_state_dict(state)
