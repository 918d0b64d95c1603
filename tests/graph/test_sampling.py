"""Sampling through the real ComfyUI, previews on: step 0, the user's MODEL, LoRA and shift, merged models."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from harness.graph import Graph

USER_LORA = "user_lora.safetensors"


@pytest.fixture(scope="module", autouse=True)
def user_lora(base, toys):
    """A trunk LoRA as trainers write it for SD3.5, diffusers names."""
    hidden, generator = toys.family.model.hidden, torch.Generator().manual_seed(7)
    state = {}
    for block in range(toys.family.model.depth):
        for module in ("attn.to_q", "attn.to_v", "attn.to_out.0"):
            name = f"transformer.transformer_blocks.{block}.{module}"
            state[f"{name}.lora_A.weight"] = torch.randn(4, hidden, generator=generator)
            state[f"{name}.lora_B.weight"] = 0.02 * torch.randn(hidden, 4, generator=generator)
    save_file(state, base / "models" / "loras" / USER_LORA)


def weights(model) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a MODEL's inner model, as loaded: ComfyUI keeps them aside while a LoRA is in use."""
    kept = {key: saved[0] for key, saved in model.backup.items()}
    return {key: value.clone() for key, value in {**model.model.state_dict(), **kept}.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lora(g, model):
    return g.node("LoraLoaderModelOnly", model=model, lora_name=USER_LORA, strength_model=1.0)


def shift(g, model, value=5.0):
    return g.node("ModelSamplingSD3", model=model, shift=value)


def test_step_zero_samples_the_base_models_latent_and_leaves_the_detail_noise_alone(run, toys):
    seed, steps = 11, 4

    def build(g):
        model = toys.model(g)
        native = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        return {
            "base": toys.ksampler(g, toys.shifted(g, model), native, seed=seed, steps=steps),
            "adapted": toys.ksampler(g, toys.adapter(g, model, zero=True), toys.empty(g), seed=seed, steps=steps),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    noise = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(seed))
    spec = toys.family.latent
    assert out["base"].std() > 0.1
    assert (out["adapted"][:, :16] - out["base"]).abs().max() <= 1e-5
    # The sampler starts from the noise and follows the prediction: where it is still the noise, the prediction was 0.
    assert torch.allclose(spec.normalise(out["adapted"])[:, 16:], noise[:, 16:], atol=1e-5)


def test_a_trained_adapter_changes_both(run, toys):
    def build(g):
        model = toys.model(g)
        native = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        return {
            "base": toys.ksampler(g, model, native),
            "adapted": toys.ksampler(g, toys.adapter(g, model), toys.empty(g)),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    noise = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(5))
    assert (out["adapted"][:, :16] - out["base"]).abs().max() > 1e-2
    assert (toys.family.latent.normalise(out["adapted"])[:, 16:] - noise[:, 16:]).abs().max() > 1e-2


@pytest.mark.parametrize("order", ["base first", "adapted first"])
def test_base_and_adapted_model_sample_in_both_orders_with_previews_and_the_base_stays_bit_identical(
    comfy, run, toys, order
):
    model = run(lambda g: {"model": toys.model(g)})["model"]
    before = weights(model)

    def sampled(adapted: bool) -> torch.Tensor:
        def build(g):
            source = g.node("HarnessConstant", key="model")
            if adapted:
                return {"latent": toys.ksampler(g, toys.adapter(g, source), toys.empty(g))}
            native = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
            return {"latent": toys.ksampler(g, source, native)}

        return run(build, inputs={"model": model})["latent"]["samples"]

    kinds = [False, True] if order == "base first" else [True, False]
    first = {adapted: sampled(adapted) for adapted in kinds}
    again = {adapted: sampled(adapted) for adapted in reversed(kinds)}
    assert all(torch.equal(first[adapted], again[adapted]) for adapted in kinds)
    assert same(weights(model), before)


def test_previews_arrive_at_every_step_and_show_the_base_channels(comfy, toys):
    g = Graph()
    latent = toys.ksampler(g, toys.adapter(g, toys.model(g)), toys.empty(g, width=192, height=128), steps=3, seed=99)
    g.node("HarnessCapture", value=latent, key="latent")
    previews = comfy.run(g.prompt).previews
    assert len(previews) == 3
    assert all(image.size == (12, 8) for image in previews)  # one pixel for each latent pixel
    assert len({image.tobytes() for image in previews}) == 3


@pytest.mark.parametrize("patch", [lora, shift], ids=["lora", "shift"])
def test_what_is_put_on_the_model_before_the_adapter_counts_as_if_put_on_after(run, toys, patch):
    def build(g):
        model = toys.model(g)
        return {
            "without": toys.ksampler(g, toys.adapter(g, model), toys.empty(g)),
            "before": toys.ksampler(g, toys.adapter(g, patch(g, model)), toys.empty(g)),
            "after": toys.ksampler(g, patch(g, toys.adapter(g, model)), toys.empty(g)),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    assert torch.allclose(out["before"], out["after"], atol=1e-4)
    assert (out["before"] - out["without"]).abs().max() > 1e-2


def test_the_adapter_reads_the_original_weights_of_a_model_whose_lora_is_in_use(run, toys):
    """A LoRA that has been sampled with lives in the weights; applying the adapter then must not count it twice."""
    patched = run(lambda g: {"model": lora(g, toys.model(g))})["model"]

    def build_native(g):
        native = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        return {"latent": toys.ksampler(g, g.node("HarnessConstant", key="model"), native)}

    def build_adapted(g):
        return {"latent": toys.ksampler(g, toys.adapter(g, g.node("HarnessConstant", key="model")), toys.empty(g))}

    fresh = run(build_adapted, inputs={"model": patched})["latent"]["samples"]
    first = run(build_native, inputs={"model": patched})["latent"]["samples"]
    in_use = run(build_adapted, inputs={"model": patched})["latent"]["samples"]
    assert torch.equal(fresh, in_use)
    assert torch.equal(run(build_native, inputs={"model": patched})["latent"]["samples"], first)


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with a LoRA"])
@pytest.mark.parametrize("ending", ["interrupted", "failed"])
def test_the_users_model_is_bit_identical_after_a_run_that_did_not_end_well(comfy, run, toys, ending, with_lora):
    model = run(lambda g: {"model": lora(g, toys.model(g)) if with_lora else toys.model(g)})["model"]

    def native(g):
        empty = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        return {"latent": toys.ksampler(g, g.node("HarnessConstant", key="model"), empty)}

    before = run(native, inputs={"model": model})["latent"]["samples"]
    state = weights(model)
    g = Graph()
    adapted = toys.adapter(g, g.node("HarnessConstant", key="model"))
    size = 128 if ending == "interrupted" else 8192  # larger than the toy's position grid
    g.node("HarnessCapture", value=toys.ksampler(g, adapted, toys.empty(g, width=size), steps=6), key="latent")
    if ending == "interrupted":
        comfy.interrupt_after(2)
        result = comfy.run(g.prompt, inputs={"model": model})
        assert result.interrupted
        assert len(result.previews) == 2
    else:
        result = comfy.run(g.prompt, inputs={"model": model}, expect_error=True)
        assert "too large for this model" in result.error.exception_message
    assert same(weights(model), state)
    assert torch.equal(run(native, inputs={"model": model})["latent"]["samples"], before)


def test_the_rebuilt_model_shares_every_trunk_tensor_with_the_users(run, toys):
    out = run(lambda g: (lambda model: {"base": model, "adapted": toys.adapter(g, model)})(toys.model(g)))
    base, adapted = (out[key].model.diffusion_model.state_dict() for key in ("base", "adapted"))
    replaced = {key for key in base if base[key].data_ptr() != adapted[key].data_ptr()}
    # The embedder's bias keeps its shape but may change by the adapter's delta.
    assert replaced == {
        "x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias",
    }  # fmt: skip


def test_a_merged_file_samples_what_the_adapter_samples(run, toys):
    def build(g):
        merged = g.node("DAVAE_ModelLoader", model_name=toys.family.merged_file, dtype="auto")
        return {
            "merged": toys.ksampler(g, merged, toys.empty(g)),
            "adapted": toys.ksampler(g, toys.adapter(g, toys.model(g)), toys.empty(g)),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    assert torch.allclose(out["merged"], out["adapted"], atol=1e-4)


def test_our_sampler_makes_the_image_of_the_stock_ksampler(run, toys):
    def build(g):
        model = toys.adapter(g, toys.model(g))
        return {
            "stock": toys.ksampler(g, shift(g, model, 5.0), toys.empty(g)),
            "ours": toys.sampler(g, model, shift=5.0),
            "ours, shift on the MODEL": toys.sampler(g, shift(g, model, 5.0)),
            "ours, adapter in the node": toys.sampler(
                g, toys.model(g), adapter_name=toys.family.adapter_file, shift=5.0
            ),
            "ours, with a latent": toys.sampler(g, model, shift=5.0, width=512, latent=toys.empty(g)),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    for key, samples in out.items():
        assert torch.equal(samples, out["stock"]), key


def test_widgets_left_at_zero_take_what_the_adapter_recommends(run, toys):
    told = toys.family.recommended

    def build(g):
        model = toys.adapter(g, toys.model(g))
        explicit = {"steps": told.steps, "cfg": told.cfg, "shift": told.shift}
        return {
            "auto": toys.sampler(g, model, steps=0, cfg=0.0, shift=0.0),
            "explicit": toys.sampler(g, model, **explicit),
            "other": toys.sampler(g, model, **{**explicit, "shift": told.shift + 1}),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    assert torch.equal(out["auto"], out["explicit"])
    assert not torch.equal(out["auto"], out["other"])


def test_strength_scales_what_the_adapter_changes_in_the_pretrained_weights(run, toys):
    def build(g):
        model = toys.model(g)
        return {f"{s}": toys.ksampler(g, toys.adapter(g, model, strength=s), toys.empty(g)) for s in (0.0, 0.5, 1.0)}

    out = {key: value["samples"] for key, value in run(build).items()}
    assert (out["0.5"] - out["1.0"]).abs().max() > 1e-3
    assert (out["0.0"] - out["0.5"]).abs().max() > 1e-3


def ends_lora(base, toys) -> str:
    """A LoRA on the trunk, the embedder and the head; also written without the last two, as ``trunk_`` + its name."""
    hidden, file = toys.family.model.hidden, "ends_lora.safetensors"
    generator = torch.Generator().manual_seed(8)
    state = {
        f"{name}.lora_{factor}.weight": torch.randn(shape, generator=generator) * 0.1
        for name, shapes in {
            "transformer.transformer_blocks.0.attn.to_q": [(2, hidden), (hidden, 2)],
            "diffusion_model.final_layer.linear": [(2, hidden), (64, 2)],
            "diffusion_model.x_embedder.proj": [(2, 16, 2, 2), (hidden, 2, 1, 1)],
        }.items()
        for factor, shape in zip("AB", shapes, strict=True)
    }
    save_file(state, base / "models" / "loras" / file)
    trunk = {name: tensor for name, tensor in state.items() if name.startswith("transformer.")}
    save_file(trunk, base / "models" / "loras" / f"trunk_{file}")
    return file


def with_lora(g, model, name):
    return g.node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)


def test_a_lora_on_the_embedder_and_the_head_counts_when_it_is_put_on_before_the_adapter(base, run, toys):
    name = ends_lora(base, toys)

    def build(g):
        model = toys.shifted(g, toys.model(g))
        native = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        return {
            "plain": toys.ksampler(g, model, native),
            "base": toys.ksampler(g, with_lora(g, model, name), native),
            "adapted": toys.ksampler(g, toys.adapter(g, with_lora(g, model, name), zero=True), toys.empty(g)),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    assert (out["base"] - out["plain"]).abs().max() > 1e-2
    assert (out["adapted"][:, :16] - out["base"]).abs().max() <= 1e-4


def test_a_lora_on_the_embedder_and_the_head_loses_them_when_it_is_put_on_after_the_adapter(base, comfy, run, toys):
    name = ends_lora(base, toys)

    def sampled(name):
        return run(lambda g: {"x": toys.ksampler(g, with_lora(g, toys.adapter(g, toys.model(g)), name), toys.empty(g))})

    expected = sampled(f"trunk_{name}")["x"]["samples"]
    seen = len(comfy.log)
    assert torch.allclose(sampled(name)["x"]["samples"], expected, atol=1e-5)
    log = "\n".join(comfy.log[seen:])
    assert "final_layer.linear" in log and "x_embedder.proj" in log


def test_a_merge_of_a_model_with_itself_is_adapted_like_the_model(run, toys):
    def build(g):
        model = toys.model(g)
        merge = g.node("ModelMergeSimple", model1=model, model2=model, ratio=0.5)
        return {
            "plain": toys.ksampler(g, toys.adapter(g, model), toys.empty(g)),
            "merged": toys.ksampler(g, toys.adapter(g, merge), toys.empty(g)),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    assert torch.allclose(out["plain"], out["merged"], atol=1e-4)


def test_a_model_compiled_before_the_adapter_is_adapted_uncompiled_with_a_warning(comfy, run, toys):
    def build(g):
        model = toys.model(g)
        compiled = g.node("TorchCompileModel", model=model, backend="inductor")
        return {
            "plain": toys.ksampler(g, toys.adapter(g, model), toys.empty(g)),
            "compiled before": toys.ksampler(g, toys.adapter(g, compiled), toys.empty(g)),
        }

    seen = len(comfy.log)
    out = {key: value["samples"] for key, value in run(build).items()}
    assert torch.equal(out["plain"], out["compiled before"])
    assert "put the compile node after the adapter" in "\n".join(comfy.log[seen:])
