"""Stage 2: what is trained, from where it starts, and that the exported adapter is what was trained."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from davae_core import checkpoints, flow, tiny
from davae_core.adapter import WIDENED, Recommended, merge
from davae_core.errors import DAVAEError
from davae_core.latent import LatentSpec
from davae_core.lora import LORA_MODULES, lora_deltas
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.training import __main__ as entry
from davae_core.training.data.draws import Draws
from davae_core.training.objective import FlowConfig, noised
from davae_core.training.run import state
from davae_core.training.tasks.adapted import AdaptedModel
from davae_core.training.text.captions import thinned, vocabulary

ALL = tuple(LORA_MODULES)
SPEC = LatentSpec()
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def base(mmdit: MMDiT) -> dict[str, torch.Tensor]:
    return mmdit.state_dict()


@pytest.fixture
def model(base: dict[str, torch.Tensor]) -> AdaptedModel:
    return AdaptedModel(base, SPEC, 4, ALL, seed=0)


@pytest.fixture
def inputs(mmdit: MMDiT) -> Inputs:
    config = mmdit.config
    return torch.randn(2, 32, 8, 8), torch.rand(2), torch.randn(2, 5, config.context), torch.randn(2, config.pooled)


def train(model: AdaptedModel, inputs: Inputs, steps: int = 4) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    target = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimiser.zero_grad()
        ((model(*inputs) - target) ** 2).mean().backward()
        optimiser.step()


def test_step_zero_predicts_what_the_base_model_predicts_and_no_detail(
    model: AdaptedModel, mmdit: MMDiT, inputs: Inputs
) -> None:
    x, *rest = inputs
    prediction = model(*inputs)
    assert torch.allclose(prediction[:, :16], mmdit(x[:, :16], *rest), atol=1e-5)
    assert prediction[:, 16:].abs().max() < 1e-5


def test_only_the_embedder_the_head_and_the_lora_are_trained(model: AdaptedModel, inputs: Inputs) -> None:
    train(model, inputs, steps=2)
    trained = {name.removeprefix("mmdit.") for name, p in model.named_parameters() if p.grad is not None}
    factors = {name for name in trained if ".down." in name or ".up." in name}
    assert trained - factors == set(WIDENED)
    assert len(factors) == 2 * len(model.places)
    assert trained == {n.removeprefix("mmdit.") for n, p in model.named_parameters() if p.requires_grad}
    moved = [name for name in trained if model.mmdit.get_parameter(name).grad.abs().sum() > 0]  # type: ignore[union-attr]
    idle = trained - set(moved)
    # The last block's text queries are read by nobody.
    assert idle == {name for name in trained if "blocks.1.context_block.attn.qkv" in name and name.endswith(".0")}


def test_the_trunk_stays_what_it_was(model: AdaptedModel, base: dict[str, torch.Tensor], inputs: Inputs) -> None:
    before = {name: tensor.clone() for name, tensor in base.items()}
    train(model, inputs)
    now = {name: t for name, t in model.mmdit.state_dict().items() if "_block." not in name}
    now |= {name.replace(".linear.", "."): t for name, t in model.mmdit.state_dict().items() if "_block." in name}
    trunk = [name for name in before if name not in WIDENED]
    assert all(torch.equal(now[name], before[name]) for name in trunk)
    assert all(torch.equal(base[name], before[name]) for name in before)


def test_the_exported_adapter_merged_into_the_base_is_what_was_trained(
    model: AdaptedModel, base: dict[str, torch.Tensor], inputs: Inputs, tmp_path: Path
) -> None:
    start = model(*inputs)
    train(model, inputs)
    trained = model(*inputs)
    assert (trained - start).abs().max() > 0.1
    checkpoints.save_adapter(tmp_path / "adapter.safetensors", model.adapter(Recommended(size=64)))
    adapter = checkpoints.load_adapter(tmp_path / "adapter.safetensors")
    merged = merge(base, adapter)
    whole = MMDiT(MMDiTConfig.from_state_dict(merged))
    whole.load_state_dict(merged)
    assert torch.allclose(whole(*inputs), trained, atol=1e-5)


def test_without_zero_init_the_new_parts_are_as_wide_as_the_pretrained_ones(base: dict[str, torch.Tensor]) -> None:
    model = AdaptedModel(base, SPEC, 4, ALL, seed=0, zero_init=False)
    state = model.adapter(Recommended()).state
    for name in WIDENED[::2]:
        new = state[f"davae.{name.removesuffix('weight')}detail.weight"]
        assert new.std() == pytest.approx(float(base[name].std()), rel=0.2)
        assert state[f"davae.{name.removesuffix('weight')}delta.weight"].abs().max() == 0


def test_an_adapter_of_lower_rank_is_continued_at_a_higher_one(
    model: AdaptedModel, base: dict[str, torch.Tensor], inputs: Inputs
) -> None:
    train(model, inputs)
    start = model.adapter(Recommended())
    wider = AdaptedModel(base, SPEC, 8, ALL, seed=1, start=start)
    assert torch.allclose(wider(*inputs), model(*inputs), atol=1e-5)
    exported = wider.adapter(Recommended()).state
    downs = [tensor for name, tensor in exported.items() if name.endswith(".lora_A.weight")]
    assert downs and all(len(down) == 8 and (down.norm(dim=1) > 0).all() for down in downs)
    before = wider(*inputs)
    train(wider, inputs)
    assert (wider(*inputs) - before).abs().max() > 1e-3


def test_an_alpha_of_its_own_is_kept_when_the_rank_grows(model: AdaptedModel, base: dict[str, torch.Tensor]) -> None:
    """Files of others have any alpha; the change of the model is alpha / rank times the product."""
    start = model.adapter(Recommended())
    state = {name: torch.tensor(2.0) if name.endswith(".alpha") else t + 0.1 for name, t in start.state.items()}
    start = replace(start, state=state)
    wider = AdaptedModel(base, SPEC, 8, ALL, seed=1, start=start)
    told, expected = merge(base, wider.adapter(Recommended())), merge(base, start)
    assert all(torch.allclose(told[name], expected[name], atol=1e-5) for name in expected)


def test_an_adapter_of_higher_rank_is_reduced_to_the_nearest_change(
    model: AdaptedModel, base: dict[str, torch.Tensor], inputs: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    train(model, inputs)
    start = model.adapter(Recommended())
    state = {name: torch.tensor(8.0) if name.endswith(".alpha") else t for name, t in start.state.items()}
    start = replace(start, state=state)
    caplog.set_level("INFO")
    narrower = AdaptedModel(base, SPEC, 2, ALL, seed=0, start=start).adapter(Recommended())
    kept = total = 0.0
    whole = {(name, third): delta for name, third, delta in lora_deltas(start.lora_state())}
    for name, third, delta in lora_deltas(narrower.lora_state()):
        values = torch.linalg.svdvals(whole[name, third])
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 2
        assert (whole[name, third] - delta).norm() == pytest.approx(float(values[2:].norm()), rel=1e-3, abs=1e-5)
        kept, total = kept + float(values[:2].square().sum()), total + float(values.square().sum())
    assert f"{100 * kept / total:.1f} % of its change is kept" in caplog.text
    assert all(float(t) == 2 for name, t in narrower.state.items() if name.endswith(".alpha"))


def test_a_lora_is_not_dropped_unasked(model: AdaptedModel, base: dict[str, torch.Tensor]) -> None:
    for rank, targets in ((0, ALL), (4, ("attn.to_q",))):
        with pytest.raises(DAVAEError, match="not of this recipe's shape"):
            AdaptedModel(base, SPEC, rank, targets, seed=0, start=model.adapter(Recommended()))


def test_a_factor_on_the_detail_is_part_of_the_adapters_units(stages: Any, tmp_path: Path) -> None:
    """What is drawn with it are latents of the same autoencoder."""
    out = tmp_path / "ahead"
    assert stages.run("adapter", out, 2, "--detail-factor", "2") == 0
    latent = checkpoints.load_adapter(out / tiny.ADAPTER).config.latent
    davae = checkpoints.load_autoencoder(stages.file("autoencoder"), torch.float32)
    assert latent.detail_std == pytest.approx([2 * std for std in davae.latent.detail_std], rel=1e-5)
    assert (
        latent.detail_mean == pytest.approx(davae.latent.detail_mean) and latent.base_scale == davae.latent.base_scale
    )
    z = davae.encode(torch.rand(1, 3, 32, 32) * 2 - 1)
    base, detail = latent.split(latent.normalise(z))
    assert torch.allclose(base, davae.latent.normalise(z)[:, :16]) and detail.std() < base.std()
    assert torch.allclose(latent.denormalise(latent.normalise(z)), z, atol=1e-5)


def test_stored_latents_are_in_those_units_too(stages: Any, tmp_path: Path) -> None:
    """A training on latents computed before has the losses of one that encodes the pictures itself."""
    kept = tmp_path / "latents"
    size = ["--data.size", "32", "--data.no-flip", "--data.workers", "0"]
    made = ["latents", "--data.images", str(stages.images), *size, "--autoencoder", str(stages.file("autoencoder"))]
    assert entry.main([*made, "--out", str(kept), "--dtype", "fp32"]) == 0
    more = ["--detail-factor", "2", "--run.precision", "fp32"]
    assert stages.run("adapter", tmp_path / "a", 2, *more) == 0
    assert stages.run("adapter", tmp_path / "b", 2, *more, "--latents", str(kept)) == 0
    losses = [stages.curves(tmp_path / name)["adapter/detail"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--detail-factor", "0"], "--detail-factor must be above 0"),
        (["--detail-factor", "nan"], "--detail-factor must be above 0"),
        (["--no-zero-init", "--start", "a.safetensors"], "--no-zero-init draws what --start brings along"),
    ],
)
def test_settings_that_make_no_sense_are_refused(stages: Any, tmp_path: Path, option: list[str], message: str) -> None:
    adapter = str(stages.file("adapter"))
    option = [adapter if word == "a.safetensors" else word for word in option]
    with pytest.raises(DAVAEError, match=message):
        stages.run("adapter", tmp_path / "out", 2, *option)
    assert not (tmp_path / "out").exists()


def test_rank_zero_trains_the_embedder_and_the_head_alone(base: dict[str, torch.Tensor], inputs: Inputs) -> None:
    model = AdaptedModel(base, SPEC, 0, ALL, seed=0)
    train(model, inputs)
    assert {n.removeprefix("mmdit.") for n, p in model.named_parameters() if p.requires_grad} == set(WIDENED)
    adapter = model.adapter(Recommended())
    assert adapter.lora_state() == {}
    whole = MMDiT(MMDiTConfig.from_state_dict(merge(base, adapter)))
    whole.load_state_dict(merge(base, adapter))
    assert torch.allclose(whole(*inputs), model(*inputs), atol=1e-5)


def test_a_base_model_in_half_precision_is_trained_in_full(base: dict[str, torch.Tensor], inputs: Inputs) -> None:
    half = {name: tensor.half() for name, tensor in base.items()}
    model = AdaptedModel(half, SPEC, 4, ALL, seed=0)
    train(model, inputs)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    merged = merge({name: tensor.float() for name, tensor in half.items()}, model.adapter(Recommended()))
    whole = MMDiT(MMDiTConfig.from_state_dict(merged))
    whole.load_state_dict(merged)
    assert torch.allclose(whole(*inputs), model(*inputs), atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(base: dict[str, torch.Tensor], inputs: Inputs) -> None:
    gradients = []
    for recompute in (False, True):
        model = AdaptedModel(base, SPEC, 4, ALL, seed=0)
        if recompute:
            model.checkpoint_blocks()
        train(model, inputs, steps=2)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-8), name


def test_gradient_checkpointing_gives_the_same_losses(stages: Any, tmp_path: Path) -> None:
    assert stages.run("adapter", tmp_path / "kept", 3) == 0
    assert stages.run("adapter", tmp_path / "again", 3, "--gradient-checkpointing") == 0
    kept, again = (stages.curves(tmp_path / name)["adapter/loss"] for name in ("kept", "again"))
    assert kept == pytest.approx(again, rel=1e-5)


def test_kept_latents_give_the_same_losses(stages: Any, tmp_path: Path) -> None:
    for kept in ("--keep-latents", "--no-keep-latents"):
        assert stages.run("adapter", tmp_path / kept, 4, kept) == 0
    a, b = (stages.curves(tmp_path / kept)["adapter/loss"] for kept in ("--keep-latents", "--no-keep-latents"))
    assert a == pytest.approx(b, rel=1e-5)


def test_the_files_that_were_read_are_not_changed(stages: Any, tmp_path: Path) -> None:
    read = [stages.file("base_dit"), stages.file("base_dit", 1), stages.file("autoencoder")]
    before = [path.read_bytes() for path in read]
    assert stages.run("adapter", tmp_path, 2) == 0
    assert [path.read_bytes() for path in read] == before
    names = {name.split("/", 2)[2] for name in stages.weights(tmp_path) if name.startswith("adapter/weight/")}
    assert {name for name in names if "mmdit" not in name} == set()


def test_the_exported_adapter_holds_the_averaged_weights(stages: Any, tmp_path: Path) -> None:
    assert stages.run("adapter", tmp_path, 4) == 0
    saved = state.load(tmp_path).tensors
    exported = stages.exported("adapter", tmp_path)
    name = "x_embedder.proj"
    detail = exported[f"{stages.exports['adapter'][0]}/davae.{name}.detail.weight"]
    assert torch.equal(detail, saved[f"adapter/average/model.mmdit.{name}.weight"][:, 16:])
    assert not torch.equal(detail, saved[f"adapter/weight/model.mmdit.{name}.weight"][:, 16:])


def test_the_exported_adapter_belongs_to_the_latents_it_was_trained_on(stages: Any) -> None:
    adapter = checkpoints.load_adapter(stages.file("adapter"))
    assert adapter.config.latent == checkpoints.load_autoencoder(stages.file("autoencoder")).latent
    assert set(adapter.config.latent.detail_std) != {1.0}


@pytest.mark.parametrize("stage", ["base_dit", "adapter"])
def test_min_snr_weighs_the_loss_and_not_what_is_logged_beside_it(stages: Any, tmp_path: Path, stage: str) -> None:
    for gamma in ("0", "5"):
        assert stages.run(stage, tmp_path / gamma, 1, "--flow.min-snr", gamma) == 0
    plain, weighed = (
        {name.split("/")[-1]: points[1] for name, points in stages.curves(tmp_path / gamma).items()}
        for gamma in ("0", "5")
    )
    error = "error" if stage == "base_dit" else "base"
    assert plain["loss"] == pytest.approx(plain[error])  # the detail's weight is still 0
    assert weighed[error] == plain[error]
    assert 0 < weighed["loss"] < 0.9 * plain["loss"]


def test_noise_and_times_are_those_of_the_flow() -> None:
    x0, draws = torch.randn(4000, 1, 1, 2), Draws(0, 3, torch.arange(4000))
    config = FlowConfig(shift=3.0, min_snr=5.0)
    point = noised(x0, draws, config)
    noise = draws.normal("noise", x0)
    assert torch.equal(point.x, flow.add_noise(x0, noise, point.t))
    assert torch.equal(point.target, noise - x0)
    assert torch.equal(point.weight, flow.min_snr_weight(point.t, 5.0))  # type: ignore[arg-type]
    unshifted = flow.shift_time(point.t, 1 / 3.0)
    logits = torch.logit(unshifted)
    assert abs(logits.mean()) < 0.06 and abs(logits.std() - 1) < 0.06
    assert noised(x0, draws, FlowConfig()).weight is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, value) for name in ("prompt_dropout", "word_dropout") for value in (-0.1, 1.1, float("nan"))),
        *(("shift", value) for value in (-1.0, float("inf"))),
        ("time_std", -1.0),
        ("time_mean", float("nan")),
        ("min_snr", -1.0),
    ],
)
def test_a_flow_of_nothing_is_refused(setting: str, value: float) -> None:
    with pytest.raises(DAVAEError, match=rf"--flow\.{setting.replace('_', '-')} must be .*, got {value}"):
        FlowConfig(**{setting: value})


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        ("adapter", "--flow.shift 0", r"--flow\.shift must be above 0 and finite, got 0"),
        ("base_dit", "--flow.shift 0", r"--flow\.shift must be above 0"),
        ("adapter", "--rank -1", "--rank must be at least 0; 0 trains the embedder and the head alone, got -1"),
    ],
)
def test_settings_that_make_no_training_are_refused(
    stages: Any, tmp_path: Path, stage: str, more: str, said: str
) -> None:
    with pytest.raises(DAVAEError, match=said):
        stages.run(stage, tmp_path / "run", 1, *more.split())


def test_times_do_not_depend_on_noise() -> None:
    draws = Draws(0, 3, torch.arange(4000))
    point = noised(torch.zeros(4000, 1, 1, 1), draws, FlowConfig())
    noise = draws.normal("noise", torch.empty(4000, 1, 1, 1)).flatten()
    assert torch.corrcoef(torch.stack([point.t, noise]))[0, 1].abs() < 0.05


def test_the_vocabulary_is_the_words_of_the_captions() -> None:
    assert vocabulary(["flat wave", "round Wave!"]) == ("flat", "round", "wave")


def test_a_thinned_prompt_is_empty_or_lacks_words_as_often_as_told() -> None:
    texts = thinned(["a b c"] * 4000, Draws(0, 3, torch.arange(4000)), 0.25, 0.2)
    counts = Counter(texts)
    assert all(text in ("a b c", "a b", "a c", "b c", "a", "b", "c", "") for text in counts)
    assert counts[""] / 4000 == pytest.approx(0.25 + 0.75 * 0.2**3, abs=0.03)
    assert counts["a b c"] / 4000 == pytest.approx(0.75 * 0.8**3, abs=0.03)
    for text in ("a b", "a c", "b c"):
        assert counts[text] / 4000 == pytest.approx(0.75 * 0.8**2 * 0.2, abs=0.03)


def test_what_a_prompt_loses_does_not_depend_on_the_others_in_its_batch() -> None:
    captions = ["a b", "c d e f g", "h", "i j k"] * 16
    whole = thinned(captions, Draws(0, 3, torch.arange(64)), 0.1, 0.3)
    for i, caption in enumerate(captions):
        assert thinned([caption], Draws(0, 3, torch.tensor([i])), 0.1, 0.3) == whole[i : i + 1]
    assert thinned(captions, Draws(0, 3, torch.arange(64)), 0.0, 0.0) == captions


@pytest.mark.parametrize(("dropout", "alike"), [("1", True), ("0", False)])
def test_prompt_dropout_decides_whether_captions_matter(stages: Any, tmp_path: Path, dropout: str, alike: bool) -> None:
    # A trained base model listens to its prompts; this one, fresh, has gates of zero: so its text encoder tells.
    assert stages.run("base_dit", tmp_path, 3, "--flow.prompt-dropout", dropout) == 0
    moments = stages.weights(tmp_path)["dit/moment/text.token_embedding.weight/exp_avg"]
    assert bool((moments[2:] == 0).all()) is alike


def test_the_detail_weight_rises_as_told(stages: Any, tmp_path: Path) -> None:
    assert stages.run("adapter", tmp_path, 5) == 0
    curves = stages.curves(tmp_path)
    weights = curves["adapter/detail_weight"]
    assert weights == pytest.approx({step + 1: flow.detail_weight(step, 4) for step in range(5)})
    assert weights[5] == 1.0
    for step, weight in weights.items():
        base, detail = curves["adapter/base"][step], curves["adapter/detail"][step]
        assert curves["adapter/loss"][step] == pytest.approx((base + weight * detail) / (1 + weight), rel=1e-5)
