"""LoRA on linear layers: trained as factors, and the same thing once merged."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from davae_core.adapter import Adapter, merge, zero_adapter
from davae_core.latent import LatentSpec
from davae_core.lora import LORA_MODULES
from davae_core.mmdit import MMDiT
from davae_core.training.tasks import lora
from davae_core.training.tasks.lora import LoraLinear

ALL = tuple(LORA_MODULES)


def layer(features: int = 6, rank: int = 2, alpha: float = 4.0, thirds: tuple[int | None, ...] = (None,)) -> LoraLinear:
    made = LoraLinear(nn.Linear(5, features))
    for third in thirds:
        rows = features if third is None else features // 3
        made.add(third, torch.randn(rank, 5), torch.randn(rows, rank), alpha)
    return made


def test_a_change_is_alpha_over_rank_times_the_product() -> None:
    made, x = layer(), torch.randn(3, 5)
    change = 4 / 2 * made.up["all"] @ made.down["all"]
    expected = nn.functional.linear(x, made.linear.weight + change, made.linear.bias)
    assert torch.allclose(made(x), expected, atol=1e-5)


@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_change_of_one_third_leaves_the_others_alone(third: int) -> None:
    made, x = layer(thirds=(third,)), torch.randn(3, 5)
    plain, changed = made.linear(x).chunk(3, dim=-1), made(x).chunk(3, dim=-1)
    assert [torch.equal(a, b) for a, b in zip(plain, changed)] == [i != third for i in range(3)]


def test_thirds_are_changed_by_factors_of_their_own() -> None:
    made, x = layer(thirds=(0, 2)), torch.randn(3, 5)
    weight = made.linear.weight.detach().clone()
    for third in (0, 2):
        weight.chunk(3)[third].add_(2 * made.up[str(third)].detach() @ made.down[str(third)].detach())
    assert torch.allclose(made(x), nn.functional.linear(x, weight, made.linear.bias), atol=1e-5)


def test_the_layer_itself_is_frozen() -> None:
    made = layer()
    made(torch.randn(3, 5)).sum().backward()
    trained = {name for name, p in made.named_parameters() if p.grad is not None}
    assert trained == {"down.all", "up.all"}


@pytest.fixture
def attached(make_mmdit: Callable[..., MMDiT]) -> tuple[MMDiT, Adapter, dict[str, tuple[LoraLinear, str]]]:
    """A toy model with LoRA on everything that can have it, and the adapter that it came from."""
    model = make_mmdit(depth=3, dual_attention=(0, 1))
    adapter = zero_adapter(model.config, LatentSpec(), 4, ALL, torch.Generator().manual_seed(0))
    return model, adapter, lora.attach(model, adapter.lora_state())


def predict(model: MMDiT) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    config = model.config
    x, t = torch.randn(2, config.in_channels, 8, 8, generator=g), torch.rand(2, generator=g)
    context, pooled = torch.randn(2, 5, config.context, generator=g), torch.randn(2, config.pooled, generator=g)
    return model(x, t, context, pooled)


def test_attaching_changes_no_prediction(make_mmdit: Callable[..., MMDiT]) -> None:
    model = make_mmdit()
    before = predict(model)
    lora.attach(model, zero_adapter(model.config, LatentSpec(), 4, ALL).lora_state())
    # Not bit for bit: where a tensor lies in memory decides how some processors add up a product.
    assert (predict(model) - before).abs().max() <= 1e-5


def test_what_is_attached_comes_back_under_the_same_names(
    attached: tuple[MMDiT, Adapter, dict[str, tuple[LoraLinear, str]]],
) -> None:
    _, adapter, places = attached
    back = lora.tensors(places)
    assert back.keys() == adapter.lora_state().keys()
    assert all(torch.equal(back[name], adapter.state[name]) for name in back)


def test_every_target_has_factors_of_its_own(
    attached: tuple[MMDiT, Adapter, dict[str, tuple[LoraLinear, str]]],
) -> None:
    model, _, places = attached
    parameters = {name for name, _ in model.named_parameters() if ".down." in name or ".up." in name}
    assert len(parameters) == 2 * len(places) == len({(id(layer), key) for layer, key in places.values()}) * 2
    modules = {stem.split(".", 3)[3] for stem in places}
    assert modules == set(ALL)
    assert not any(stem.startswith("transformer.transformer_blocks.2.ff_context") for stem in places)
    assert not any("blocks.2.attn2" in stem for stem in places)


@pytest.mark.parametrize("module", ALL)
def test_a_trained_change_predicts_the_same_when_it_is_merged(make_mmdit: Callable[..., MMDiT], module: str) -> None:
    model = make_mmdit(dual_attention=(0, 1))
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    zero = zero_adapter(model.config, LatentSpec(), 4, (module,))
    places = lora.attach(model, zero.lora_state())
    plain = predict(model)
    with torch.no_grad():
        for layer, key in places.values():
            layer.up[key].normal_(std=0.5)
    trained = predict(model)
    assert (trained - plain).abs().max() > 1e-4

    weights = merge(base, Adapter(zero.config, zero.state | lora.tensors(places)))
    # The embedder and the head are wider now, for the detail; here the old ones do.
    weights = {name: weights[name] if weights[name].shape == base[name].shape else base[name] for name in base}
    merged = make_mmdit(dual_attention=(0, 1))
    merged.load_state_dict(weights)
    assert torch.allclose(predict(merged), trained, atol=1e-5)
