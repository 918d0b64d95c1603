"""The diffusion transformer: padding, positions, patches, and what each part of a block is for."""

from collections.abc import Callable

import pytest
import torch

from davae_core.errors import CheckpointError, DAVAEError, LatentError
from davae_core.mmdit import MMDiT, MMDiTConfig, sincos_grid, time_features

MakeMmdit = Callable[..., MMDiT]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(config: MMDiTConfig, height: int = 6, width: int = 4, batch: int = 2) -> Inputs:
    x = torch.randn(batch, config.in_channels, height, width)
    return x, torch.rand(batch), torch.randn(batch, 5, config.context), torch.randn(batch, config.pooled)


def test_prediction_has_the_latents_size_and_the_heads_channels(make_mmdit: MakeMmdit) -> None:
    model = make_mmdit(in_channels=32, out_channels=24)
    assert model(*inputs(model.config)).shape == (2, 24, 6, 4)


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 7), (3, 5), (1, 1)])
def test_odd_sizes_are_wrapped_around_on_the_right_and_the_bottom(mmdit: MMDiT, height: int, width: int) -> None:
    x, *rest = inputs(mmdit.config, height, width)
    rows, columns = range(height + height % 2), range(width + width % 2)
    wrapped = torch.stack([torch.stack([x[..., i % height, j % width] for j in columns], -1) for i in rows], -2)
    assert torch.equal(mmdit(x, *rest), mmdit(wrapped, *rest)[..., :height, :width])


@pytest.mark.parametrize(("height", "width"), [(34, 4), (4, 33)])
def test_a_latent_larger_than_the_grid_is_refused_with_both_sizes(mmdit: MMDiT, height: int, width: int) -> None:
    x, *rest = inputs(mmdit.config, height, width, 1)
    with pytest.raises(LatentError) as error:
        mmdit(x, *rest)
    assert f"{height} x {width + width % 2} pixels" in str(error.value)
    assert "(32 x 32)" in str(error.value)


def test_a_latent_may_fill_the_grid(mmdit: MMDiT) -> None:
    x, *rest = inputs(mmdit.config, 32, 2, 1)
    assert mmdit(x, *rest).shape == x.shape


@pytest.mark.parametrize("shape", [(1, 32, 4, 4), (16, 4, 4), (1, 16, 1, 4, 4)])
def test_a_wrong_latent_is_refused_with_its_shape_and_the_right_one(mmdit: MMDiT, shape: tuple[int, ...]) -> None:
    _, *rest = inputs(mmdit.config, batch=1)
    with pytest.raises(LatentError, match=r"expected \[batch, 16, h, w\]") as error:
        mmdit(torch.zeros(shape), *rest)
    assert str(list(shape)) in str(error.value)


def test_positions_are_the_centre_of_the_grid(mmdit: MMDiT) -> None:
    given = inputs(mmdit.config, 6, 8)  # 3 x 4 tokens in a grid of 16 x 16
    before = mmdit(*given)
    square = mmdit.pos_embed.view(16, 16, -1)
    kept = square[6:9, 6:10].clone()
    square.fill_(torch.nan)
    square[6:9, 6:10] = kept
    assert torch.equal(mmdit(*given), before)
    square[6, 6] += 1
    assert not torch.allclose(mmdit(*given), before)


def test_head_rows_are_token_position_then_channel(mmdit: MMDiT) -> None:
    head = mmdit.final_layer.linear
    head.weight.zero_()
    head.bias.copy_(torch.arange(64.0))
    v = mmdit(*inputs(mmdit.config))
    for channel in range(16):
        for y in range(6):
            for x in range(4):
                assert (v[:, channel, y, x] == (y % 2 * 2 + x % 2) * 16 + channel).all()


def test_images_of_a_batch_do_not_see_each_other(mmdit: MMDiT) -> None:
    given = inputs(mmdit.config)
    together = mmdit(*given)
    for i in range(2):
        assert torch.allclose(mmdit(*(part[i : i + 1] for part in given)), together[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("changed", range(4))
def test_every_input_counts(mmdit: MMDiT, changed: int) -> None:
    given = list(inputs(mmdit.config))
    before = mmdit(*given)
    given[changed] = given[changed] * 0.5
    assert (mmdit(*given) - before).abs().max() > 1e-4


def test_the_order_of_text_tokens_does_not_matter(mmdit: MMDiT) -> None:
    x, t, context, pooled = inputs(mmdit.config)
    assert torch.allclose(mmdit(x, t, context.flip(1), pooled), mmdit(x, t, context, pooled), atol=1e-5)


def test_the_place_of_image_tokens_does(mmdit: MMDiT) -> None:
    x, *rest = inputs(mmdit.config, 4, 4)
    rolled = mmdit(x.roll(2, -1), *rest).roll(-2, -1)
    assert not torch.allclose(rolled, mmdit(x, *rest), atol=1e-3)


def test_second_attention_comes_on_top_of_a_plain_block(make_mmdit: MakeMmdit) -> None:
    dual, plain = make_mmdit(), make_mmdit(dual_attention=())
    state = dual.state_dict()
    for name, tensor in state.items():
        if ".attn2.proj." in name:
            tensor.zero_()
    state = {name: tensor for name, tensor in state.items() if ".attn2." not in name}
    for part in ("weight", "bias"):  # the first six vectors are those of a plain block, the last three are attn2's
        name = f"joint_blocks.0.x_block.adaLN_modulation.1.{part}"
        state[name] = state[name][: 6 * 128]
    plain.load_state_dict(state)
    given = inputs(dual.config)
    assert torch.equal(dual(*given), plain(*given))


def test_second_attention_with_the_weights_of_the_first_doubles_it_where_there_is_no_text(
    make_mmdit: MakeMmdit,
) -> None:
    dual, plain = make_mmdit(), make_mmdit(dual_attention=())
    state = dual.state_dict()
    for name, tensor in state.items():
        if ".attn2." in name:
            tensor.copy_(state[name.replace(".attn2.", ".attn.")])
    once = {name: tensor.clone() for name, tensor in state.items() if ".attn2." not in name}
    for part in ("weight", "bias"):
        vectors = state[f"joint_blocks.0.x_block.adaLN_modulation.1.{part}"]
        vectors[6 * 128 :] = vectors[: 3 * 128]  # shift, scale and gate of the first attention
        once[f"joint_blocks.0.x_block.adaLN_modulation.1.{part}"] = vectors[: 6 * 128]
        once[f"joint_blocks.0.x_block.attn.proj.{part}"] *= 2
    plain.load_state_dict(once)
    x, t, context, pooled = inputs(dual.config)
    assert torch.allclose(dual(x, t, context[:, :0], pooled), plain(x, t, context[:, :0], pooled), atol=1e-5)


def test_modulation_is_shift_then_scale(mmdit: MMDiT) -> None:
    layer = mmdit.final_layer
    layer.adaLN_modulation[1].weight.zero_()
    layer.adaLN_modulation[1].bias[:128], layer.adaLN_modulation[1].bias[128:] = 0.25, 2.0
    tokens = torch.randn(1, 3, 128)
    normal = (tokens - tokens.mean(-1, keepdim=True)) / tokens.std(-1, correction=0, keepdim=True)
    assert torch.allclose(layer(tokens, torch.randn(1, 128)), layer.linear(0.25 + 3.0 * normal), atol=1e-4)


def test_second_attention_does_not_read_the_text(make_mmdit: MakeMmdit) -> None:
    model = make_mmdit(depth=1)  # in the last block text reaches the image through the joint attention only
    x, t, context, pooled = inputs(model.config)
    model.joint_blocks[0].x_block.attn.proj.weight.zero_()
    assert torch.equal(model(x, t, context, pooled), model(x, t, 3 * context, pooled))
    model.joint_blocks[0].x_block.attn2.proj.weight.mul_(2)
    assert not torch.allclose(model(x, t, context, pooled), model(x, t, context, 3 * pooled))


def test_queries_and_keys_are_normalised_where_the_model_says_so(make_mmdit: MakeMmdit) -> None:
    for qk_norm in (True, False):
        model = make_mmdit(qk_norm=qk_norm)
        given = inputs(model.config)
        before = model(*given)
        for block in model.joint_blocks:
            for stream in (block.x_block, block.context_block):
                stream.attn.qkv.weight[:128] *= 10  # queries
                stream.attn.qkv.bias[:128] *= 10
        assert torch.allclose(model(*given), before, atol=1e-4) == qk_norm


def test_time_is_told_in_thousandths_by_cosines_then_sines() -> None:
    features = time_features(torch.tensor([0.0, 0.25]))
    assert features.shape == (2, 256) and features.dtype == torch.float32
    assert (features[0, :128] == 1).all() and (features[0, 128:] == 0).all()
    angle = 250.0 * 10000 ** (-3 / 128)
    assert features[1, 3].item() == pytest.approx(torch.tensor(angle, dtype=torch.float64).cos().item(), abs=1e-4)
    assert features[1, 131].item() == pytest.approx(torch.tensor(angle, dtype=torch.float64).sin().item(), abs=1e-4)


def test_position_features_tell_columns_then_rows() -> None:
    grid = sincos_grid(5, 64)
    assert grid.shape == (1, 25, 64) and grid.dtype == torch.float32
    square = grid.view(5, 5, 64)
    assert torch.equal(square[0, :, :32], square[4, :, :32])
    assert torch.equal(square[:, 0, 32:], square[:, 4, 32:])
    assert torch.equal(square[2, 3, :32], square[3, 1, 32:])
    assert square[0, 3, 0].item() == pytest.approx(torch.tensor(3.0).sin().item())
    assert square[0, 3, 16].item() == pytest.approx(torch.tensor(3.0).cos().item())
    assert len({tuple(row.tolist()) for row in grid[0]}) == 25


def test_position_features_at_half_the_unit_lie_between() -> None:
    assert torch.allclose(sincos_grid(5, 64, 0.5).view(5, 5, 64)[::2, ::2], sincos_grid(3, 64).view(3, 3, 64))


def test_bfloat16_is_near_float32(mmdit: MMDiT) -> None:
    given = inputs(mmdit.config)
    exact = mmdit(*given)
    mmdit.bfloat16()
    x, t, context, pooled = given
    v = mmdit(x.bfloat16(), t, context.bfloat16(), pooled.bfloat16())
    assert v.dtype == torch.bfloat16
    assert (v - exact).abs().max() < 0.05 * exact.abs().max()


def test_tokens_lie_one_after_another_in_memory(mmdit: MMDiT) -> None:
    """In another order, each layer norm would copy them."""
    laid_out = []
    for block in mmdit.joint_blocks:
        block.register_forward_pre_hook(lambda module, given: laid_out.append(given[1].is_contiguous()))
    mmdit(*inputs(mmdit.config))
    assert laid_out == [True] * mmdit.config.depth


@pytest.mark.parametrize(("height", "width"), [(6, 4), (5, 3)])
def test_compiles_in_one_graph(mmdit: MMDiT, height: int, width: int) -> None:
    given = inputs(mmdit.config, height, width)
    torch._dynamo.reset()
    compiled = torch.compile(mmdit, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*given), mmdit(*given), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dual_attention": (), "qk_norm": False},
        {"dual_attention": (1,), "depth": 3},
        {"in_channels": 32, "out_channels": 48, "patch": 1, "grid": 5},
    ],
)
def test_shapes_give_the_configuration(make_mmdit: MakeMmdit, changes: dict[str, object]) -> None:
    model = make_mmdit(**changes)
    assert MMDiTConfig.from_state_dict(model.state_dict()) == model.config


@pytest.mark.parametrize(
    "missing", ["x_embedder.proj.weight", "final_layer.linear.weight", "pos_embed", "context_embedder.weight"]
)
def test_a_state_dict_without_a_telling_tensor_is_refused_by_its_name(mmdit: MMDiT, missing: str) -> None:
    state = mmdit.state_dict()
    del state[missing]
    with pytest.raises(CheckpointError, match=missing):
        MMDiTConfig.from_state_dict(state)


def test_a_misshapen_embedder_is_refused(mmdit: MMDiT) -> None:
    state = mmdit.state_dict() | {"x_embedder.proj.weight": torch.zeros(128, 16)}
    with pytest.raises(CheckpointError, match="not an SD3"):
        MMDiTConfig.from_state_dict(state)


@pytest.mark.parametrize("hidden", [0, 100])
def test_a_width_that_is_no_whole_number_of_heads_is_refused(hidden: int) -> None:
    with pytest.raises(DAVAEError, match=f"multiple of 64, got {hidden}"):
        MMDiTConfig(hidden=hidden)


def test_prompts_of_different_lengths_in_a_batch_are_as_each_by_itself(make_mmdit: MakeMmdit) -> None:
    model = make_mmdit(depth=3, dual_attention=(0,))
    x, t, context, pooled = inputs(model.config)
    present = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    together = model(x, t, context, pooled, present)
    alone = model(x[1:], t[1:], context[1:, :3], pooled[1:])
    assert torch.allclose(together[1:], alone, atol=1e-5)
    assert torch.allclose(together[:1], model(x[:1], t[:1], context[:1], pooled[:1]), atol=1e-5)
    assert not torch.allclose(model(x, t, context, pooled)[1:], alone, atol=1e-3)
