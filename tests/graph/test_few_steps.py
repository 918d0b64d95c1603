"""Few-Step LoRA: the weights of any LoRA, the settings of its file; every wrong input is said in clear words."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from davae_core import checkpoints, tiny
from davae_core.adapter import Recommended
from harness.untrained import Family

AS_TOLD = {"steps": 0, "cfg": 0.0}  # of the Adapted SD3.5 Sampler: what is recommended


def few_steps(g, toys, model=None, strength: float = 1.0, name: str | None = None):
    """The node, on the adapted toy model where no other is given."""
    model = model or toys.adapter(g, toys.model(g))
    return g.node("DAVAE_FewSteps", model=model, lora_name=name or toys.family.few_steps_file, strength=strength)


def by_hand(g, toys, model=None, shift: float | None = None, strength: float = 1.0):
    """The same file by stock nodes; its settings are left to the sampler."""
    model = model or toys.adapter(g, toys.model(g))
    model = stock_lora(g, model, toys.family.few_steps_file, strength)
    return g.node("ModelSamplingSD3", model=model, shift=shift or toys.family.few_steps().recommended.shift)


def stock_lora(g, model, name: str, strength: float = 1.0):
    return g.node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)


def constant(g, key: str = "model"):
    return g.node("HarnessConstant", key=key)


@pytest.fixture(scope="module")
def told(toys) -> Recommended:
    """What the LoRA's file recommends; none of it is what the adapter does."""
    told, other = toys.family.few_steps().recommended, toys.family.recommended
    assert told.shift != other.shift and told.cfg != other.cfg and told.steps != other.steps
    return told


@pytest.fixture(scope="module")
def style(base, toys) -> str:
    """An ordinary LoRA on the trunk, the embedder and the head."""
    hidden, generator = toys.family.model.hidden, torch.Generator().manual_seed(8)
    shapes = {
        "transformer.transformer_blocks.0.attn.to_q": [(2, hidden), (hidden, 2)],
        "diffusion_model.final_layer.linear": [(2, hidden), (64, 2)],
        "diffusion_model.x_embedder.proj": [(2, 16, 2, 2), (hidden, 2, 1, 1)],
    }
    state = {
        f"{name}.lora_{factor}.weight": 0.1 * torch.randn(shape, generator=generator)
        for name, both in shapes.items()
        for factor, shape in zip("AB", both, strict=True)
    }
    save_file(state, base / "models" / "loras" / "few_steps_style.safetensors")
    return "few_steps_style.safetensors"


@pytest.fixture
def write(base):
    """``write(name, family, **changes)``: a few-step LoRA of a family."""

    def go(name: str, family: Family, **changes: object) -> str:
        checkpoints.save_few_step_lora(base / "models" / "loras" / name, replace(family.few_steps(), **changes))
        return name

    return go


@pytest.fixture
def drawn(run):
    """``drawn(build, **inputs)``: the latents of a graph's samplers, by name."""

    def go(build, **inputs: object) -> dict[str, torch.Tensor]:
        return {key: value["samples"] for key, value in run(build, inputs=inputs).items()}

    return go


# Settings and weights


def test_it_draws_as_the_stock_loader_with_the_settings_of_the_file(drawn, toys, told):
    explicit = {"steps": told.steps, "cfg": told.cfg}

    def build(g):
        adapted = toys.adapter(g, toys.model(g))
        return {
            "ours": toys.sampler(g, few_steps(g, toys, adapted), **AS_TOLD),
            "ours by the stock sampler": toys.ksampler(g, few_steps(g, toys, adapted), toys.empty(g), **explicit),
            "by hand": toys.ksampler(g, by_hand(g, toys, adapted), toys.empty(g), **explicit),
            "without": toys.ksampler(g, adapted, toys.empty(g), **explicit),
        }

    out = drawn(build)
    assert torch.equal(out["ours"], out["by hand"]) and torch.equal(out["ours by the stock sampler"], out["by hand"])
    assert (out["ours"] - out["without"]).abs().max() > 0.1


@pytest.mark.parametrize("strength", [0.4, 2.0])
def test_strength_is_that_of_the_stock_loader_and_leaves_the_settings(drawn, toys, told, strength):
    def build(g):
        hand = by_hand(g, toys, strength=strength)
        return {
            "ours": toys.sampler(g, few_steps(g, toys, strength=strength), **AS_TOLD),
            "by hand": toys.sampler(g, hand, steps=told.steps, cfg=told.cfg),
        }

    out = drawn(build)
    assert torch.equal(out["ours"], out["by hand"])


def test_at_strength_0_the_model_comes_back_with_the_adapters_settings(run, drawn, toys):
    model = run(lambda g: {"m": toys.adapter(g, toys.model(g))})["m"]
    assert run(lambda g: {"m": few_steps(g, toys, constant(g), strength=0.0)}, inputs={"model": model})["m"] is model

    def build(g):
        adapted = toys.adapter(g, toys.model(g))
        return {
            "off": toys.sampler(g, few_steps(g, toys, adapted, strength=0.0), **AS_TOLD),
            "without": toys.sampler(g, adapted, **AS_TOLD),
            "on": toys.sampler(g, few_steps(g, toys, adapted), **AS_TOLD),
        }

    out = drawn(build)
    assert torch.equal(out["off"], out["without"]) and not torch.equal(out["on"], out["without"])


def test_the_samplers_own_widgets_win(drawn, toys):
    widgets = {"steps": 4, "cfg": 3.0, "shift": 5.0}

    def build(g):
        return {
            "ours": toys.sampler(g, few_steps(g, toys), **widgets),
            "by hand": toys.ksampler(g, by_hand(g, toys, shift=5.0), toys.empty(g), steps=4, cfg=3.0),
        }

    out = drawn(build)
    assert torch.equal(out["ours"], out["by hand"])


def test_a_shift_before_the_node_gives_way_and_one_after_it_counts(drawn, toys):
    def shifted(g, model):
        return g.node("ModelSamplingSD3", model=model, shift=7.0)

    def build(g):
        adapted = toys.adapter(g, toys.model(g))
        models = {
            "plain": few_steps(g, toys, adapted),
            "before": few_steps(g, toys, shifted(g, adapted)),
            "before the adapter": few_steps(g, toys, toys.adapter(g, shifted(g, toys.model(g)))),
            "after": shifted(g, few_steps(g, toys, adapted)),
            "after by hand": by_hand(g, toys, adapted, shift=7.0),
        }
        return {name: toys.ksampler(g, model, toys.empty(g)) for name, model in models.items()}

    out = drawn(build)
    assert torch.equal(out["before"], out["plain"]) and torch.equal(out["before the adapter"], out["plain"])
    assert torch.equal(out["after"], out["after by hand"]) and not torch.equal(out["after"], out["plain"])


@pytest.mark.parametrize("silent", ["steps", "cfg", "shift"])
def test_what_the_file_does_not_say_is_as_the_adapter_recommends(drawn, toys, told, write, silent):
    half = replace(told, **{silent: type(getattr(told, silent))(0)})
    name = write(f"silent_{silent}.safetensors", toys.family, recommended=half)
    asked = {key: getattr(half, key) or getattr(toys.family.recommended, key) for key in ("steps", "cfg", "shift")}

    def build(g):
        return {
            "told": toys.sampler(g, few_steps(g, toys, name=name), **AS_TOLD),
            "explicit": toys.sampler(g, few_steps(g, toys), **asked),
        }

    out = drawn(build)
    assert torch.equal(out["told"], out["explicit"])


def test_the_connected_model_stays_as_it_is(run, drawn, toys):
    from comfy import model_management as management

    model = run(lambda g: {"m": toys.adapter(g, toys.model(g))})["m"]
    management.unload_all_models()  # a LoRA that is in use lives in the weights
    before = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}

    def plain():
        return drawn(lambda g: {"x": toys.sampler(g, constant(g), **AS_TOLD)}, model=model)["x"]

    first = plain()
    drawn(lambda g: {"x": toys.sampler(g, few_steps(g, toys, constant(g)), **AS_TOLD)}, model=model)
    again = plain()
    assert torch.equal(first, again) and not model.attachments
    management.unload_all_models()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.model.state_dict().items())


# Beside other nodes


AFTER = {
    "a style LoRA": lambda g, model, style: stock_lora(g, model, style),
    "ModelSamplingSD3": lambda g, model, style: g.node("ModelSamplingSD3", model=model, shift=2.5),
    "RescaleCFG": lambda g, model, style: g.node("RescaleCFG", model=model, multiplier=0.7),
    "Differential Diffusion": lambda g, model, style: g.node("DifferentialDiffusion", model=model),
}


@pytest.mark.parametrize("name", AFTER)
def test_the_settings_travel_through_other_nodes(drawn, toys, told, style, name):
    def build(g):
        after = AFTER[name](g, few_steps(g, toys), style)
        return {
            "told": toys.sampler(g, after, **AS_TOLD),
            "explicit": toys.sampler(g, after, steps=told.steps, cfg=told.cfg),
        }

    out = drawn(build)
    assert torch.equal(out["told"], out["explicit"])


def test_a_style_lora_counts_before_and_after_it(drawn, toys, style):
    def build(g):
        adapted = toys.adapter(g, toys.model(g))
        models = {
            "without": few_steps(g, toys, adapted),
            "before": few_steps(g, toys, stock_lora(g, adapted, style)),
            "after": stock_lora(g, few_steps(g, toys, adapted), style),
        }
        return {name: toys.sampler(g, model, **AS_TOLD) for name, model in models.items()}

    out = drawn(build)
    assert torch.allclose(out["before"], out["after"], atol=1e-4)
    assert (out["before"] - out["without"]).abs().max() > 1e-3


def test_a_merged_model_takes_it_too(drawn, toys):
    def build(g):
        merged = g.node("DAVAE_ModelLoader", model_name=toys.family.merged_file, dtype="auto")
        return {
            "merged": toys.sampler(g, few_steps(g, toys, merged), **AS_TOLD),
            "adapter": toys.sampler(g, few_steps(g, toys), **AS_TOLD),
        }

    out = drawn(build)
    assert torch.allclose(out["merged"], out["adapter"], atol=1e-4)


def test_a_masked_part_is_painted_and_the_rest_is_kept(drawn, toys, picture):
    mask = torch.zeros(picture.shape[:3])
    mask[:, :, : picture.shape[2] // 2] = 1

    def build(g):
        image, davae = constant(g, "image"), toys.davae(g)
        encoded = g.node("DAVAE_DetailEncode", image=image, davae=davae[2], size_rule="pad", mask=constant(g, "mask"))
        return {"before": encoded[0], "after": toys.sampler(g, few_steps(g, toys), latent=encoded[0], denoise=0.7)}

    out = drawn(build, image=picture, mask=mask)
    painted, kept = slice(0, 4), slice(8, None)
    assert torch.allclose(out["after"][..., kept], out["before"][..., kept], atol=1e-4)
    assert (out["after"][..., painted] - out["before"][..., painted]).abs().max() > 0.1


def test_reroll_detail_works_before_and_after_it(drawn, toys, told):
    finished = {"samples": torch.randn(1, 32, 8, 12, generator=torch.Generator().manual_seed(4))}

    def reroll(g, model):
        return g.node("DAVAE_RerollDetail", model=model, samples=constant(g, "finished"))

    def build(g):
        adapted, asked = toys.adapter(g, toys.model(g)), {"steps": told.steps, "cfg": told.cfg}
        after, before = reroll(g, few_steps(g, toys, adapted)), reroll(g, adapted)
        hand = reroll(g, by_hand(g, toys, adapted))
        return {
            "after": toys.sampler(g, after[0], latent=after[1], **AS_TOLD),
            "before": toys.sampler(g, few_steps(g, toys, before[0]), latent=before[1], **AS_TOLD),
            "by hand": toys.sampler(g, hand[0], latent=hand[1], **asked),
        }

    out = drawn(build, finished=finished)
    assert torch.equal(out["after"], out["by hand"]) and torch.equal(out["before"], out["by hand"])
    base, detail = (out["after"] - finished["samples"]).abs().split(16, dim=1)
    assert base.max() == 0 and detail.mean() > 0.1


@pytest.mark.parametrize("loader", ["adapter", "merged"])
def test_deep_copies_draw_the_same_with_it(run, drawn, toys, loader):
    def build(g):
        if loader == "merged":
            return {
                "m": few_steps(g, toys, g.node("DAVAE_ModelLoader", model_name=toys.family.merged_file, dtype="auto"))
            }
        return {"m": few_steps(g, toys)}

    model = run(build)["m"]
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this ComfyUI makes no deep copies")
    copies = [model.clone(force_deepcopy=True), model.deepclone_multigpu(model.load_device)]

    def sampled(one):
        return drawn(lambda g: {"x": toys.sampler(g, constant(g), **AS_TOLD)}, model=one)["x"]

    expected = sampled(model)
    for copy in copies:
        assert copy.model is not model.model and torch.equal(sampled(copy), expected)


def test_a_file_that_is_replaced_is_read_anew(drawn, toys, base, write):
    name = write("replaced_few_steps.safetensors", toys.family)

    def result():
        return drawn(lambda g: {"x": toys.sampler(g, few_steps(g, toys, name=name), **AS_TOLD)})["x"]

    first = result()
    write(name, replace(toys.family, seed=5))
    assert not torch.equal(result(), first)


# Wrong inputs


def test_an_unadapted_model(fails, toys):
    message = fails(lambda g: few_steps(g, toys, toys.model(g)))
    assert all(word in message for word in ("not adapted", "16 latent channels", "Put a DA-VAE Adapter node")), message


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("adapter", ["a DA-VAE adapter", "choose a few-step LoRA (models/loras)", "DA-VAE Adapter"]),
        ("lora", ["a LoRA", "choose a few-step LoRA (models/loras)", "own LoRA loaders"]),
        ("stripped", ["a LoRA", "choose a few-step LoRA (models/loras)", "own LoRA loaders"]),
        ("truncated", ["cut off"]),
        ("gone", ["was not found", "models/loras"]),
    ],
)
def test_a_file_that_is_no_few_step_lora(fails, toys, base, style, kind, words, strength):
    name, folder = f"few_steps_{kind}.safetensors", base / "models" / "loras"
    ours = folder / toys.family.few_steps_file
    if kind == "adapter":
        shutil.copy(folder / toys.family.adapter_file, folder / name)
    elif kind == "lora":
        shutil.copy(folder / style, folder / name)
    elif kind == "stripped":
        save_file(load_file(ours), folder / name)
    elif kind == "truncated":
        (folder / name).write_bytes(ours.read_bytes()[: ours.stat().st_size // 2])
    message = fails(lambda g: few_steps(g, toys, name=name, strength=strength))
    assert all(word in message for word in [name, *words]), message


def test_a_few_step_lora_as_adapter(fails, toys):
    name = toys.family.few_steps_file
    adapter = fails(lambda g: g.node("DAVAE_Adapter", model=toys.model(g), adapter_name=name, strength=1.0))
    sampler = fails(lambda g: toys.sampler(g, toys.model(g), adapter_name=name))
    for message in (adapter, sampler):
        for word in (name, "is a few-step LoRA", "choose a DA-VAE adapter", "the node Few-Step LoRA"):
            assert word in message, message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": 192, "depth": 3}, ["width 192 with", "width 128 with"]),
        ({"detail_channels": 32, "detail_mean": (), "detail_std": ()}, ["16 + 32 channels", "16 + 16 channels"]),
        ({"base_factor": 16}, ["at 1/32", "at 1/16"]),
    ],
)
def test_a_lora_for_another_kind_of_model(fails, toys, write, change, words):
    family, name = toys.family, "few_steps_other_kind.safetensors"
    if "hidden" in change:
        write(name, Family(model=replace(family.model, **change)))
    else:
        write(name, family, latent=replace(family.latent, **change))
    message = fails(lambda g: few_steps(g, toys, name=name))
    assert all(word in message for word in [name, *words, "that it was trained for"]), message


def test_a_lora_for_a_deeper_model(fails, toys, write):
    name = write("few_steps_deep.safetensors", Family(model=replace(toys.family.model, depth=4)))
    message = fails(lambda g: few_steps(g, toys, name=name))
    assert name in message and "changes 24 layers" in message and "only 12" in message, message


# History


@pytest.fixture
def said(comfy, caplog):
    """What was logged of models that do not belong together; what was said once may be said again in each test."""
    module = next(module for name, module in sys.modules.items() if name.endswith("comfy_bridge.history"))
    module._said.clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "trained on" in record.getMessage()]


def test_another_adapted_model_is_told_of_once(run, toys, write, said):
    name = write("few_steps_of_another.safetensors", Family(seed=77))
    for seed in (1, 2):
        run(lambda g, seed=seed: {"x": toys.sampler(g, few_steps(g, toys, name=name), seed=seed)})
    (told,) = said()
    assert name in told and "trained on the toy adapter, this is another" in told and "at strength 1" in told


OWN = {
    "adapter": lambda g, toys, style: toys.adapter(g, toys.model(g)),
    "merged": lambda g, toys, style: g.node("DAVAE_ModelLoader", model_name=toys.family.merged_file, dtype="auto"),
    "bf16": lambda g, toys, style: g.node("DAVAE_ModelLoader", model_name=toys.family.merged_file, dtype="bf16"),
    "a LoRA after": lambda g, toys, style: stock_lora(g, toys.adapter(g, toys.model(g)), style),
    "a LoRA before": lambda g, toys, style: toys.adapter(g, stock_lora(g, toys.model(g), style)),
    "fp8": lambda g, toys, style: toys.adapter(
        g, g.node("UNETLoader", unet_name=toys.family.model_file, weight_dtype="fp8_e4m3fn")
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_its_own_model_is_known_again(run, toys, style, said, comfy, name):
    """In other precision and with LoRAs, on embedder and head too; drawn with before, so that these are in use."""
    seen = len(comfy.log)

    def build(g):
        model = OWN[name](g, toys, style)
        first = toys.ksampler(g, model, toys.empty(g))
        return {"first": first, "second": toys.sampler(g, few_steps(g, toys, model), latent=first, **AS_TOLD)}

    run(build)
    assert said() == [] and "DA-VAE: left out" not in "\n".join(comfy.log[seen:])


def test_the_shipped_file_belongs_to_the_shipped_adapter(run, toys, said):
    def build(g):
        tiny_model = g.node("DAVAE_TinySD35")
        adapted = g.node("DAVAE_Adapter", model=tiny_model, adapter_name=tiny.ADAPTER, strength=1.0)
        return {"m": few_steps(g, toys, adapted, name=tiny.FEW_STEPS)}

    model = run(build)["m"]
    assert said() == [] and model.attachments["davae_few_steps"].cfg == 1
