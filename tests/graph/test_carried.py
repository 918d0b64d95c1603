"""What is on a MODEL before the adapter: it counts as if put on after, or the log names it. Copies of the result."""

from __future__ import annotations

import gc
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def model(run, toys):
    """A MODEL of ComfyUI's own loader."""
    return run(lambda g: {"model": toys.model(g)})["model"]


@pytest.fixture
def adapt(comfy, toys):
    """``adapt(model)``: the adapted MODEL, and what was logged meanwhile."""
    seam, checkpoints = comfy.pack("nodes.comfy_bridge"), comfy.pack("davae_core.checkpoints")

    def go(model):
        seen = len(comfy.log)
        file = comfy.base / "models" / "loras" / toys.family.adapter_file
        with torch.inference_mode():
            made = seam.apply_adapter(model, checkpoints.load_adapter(file), 1.0, file.name)
        return made, "\n".join(comfy.log[seen:])

    return go


@pytest.fixture
def sample(run, toys):
    """``sample(adapted)``: the latent of the stock KSampler."""

    def go(adapted):
        def build(g):
            return {"latent": toys.ksampler(g, g.node("HarnessConstant", key="model"), toys.empty(g))}

        return run(build, inputs={"model": adapted})["latent"]["samples"]

    return go


def before_and_after(run, toys, patch):
    """Latents with ``patch(g, model)`` before the adapter, after it, and without."""

    def build(g):
        model = toys.model(g)
        return {
            "before": toys.ksampler(g, toys.adapter(g, patch(g, model)), toys.empty(g), steps=8),
            "after": toys.ksampler(g, patch(g, toys.adapter(g, model)), toys.empty(g), steps=8),
            "without": toys.ksampler(g, toys.adapter(g, model), toys.empty(g), steps=8),
        }

    return [run(build)[key]["samples"] for key in ("before", "after", "without")]


def write_lora(base, toys, name, ends=False):
    """A LoRA of the trunk, and with ``ends`` of embedder and head instead."""
    hidden, generator = toys.family.model.hidden, torch.Generator().manual_seed(12)
    shapes = {
        "joint_blocks.0.x_block.attn.qkv": [(4, hidden), (3 * hidden, 4)],
        "joint_blocks.1.x_block.mlp.fc1": [(4, hidden), (4 * hidden, 4)],
    }
    if ends:
        shapes = {
            "final_layer.linear": [(4, hidden), (64, 4)],
            "x_embedder.proj": [(4, 16, 2, 2), (hidden, 4, 1, 1)],
        }
    state = {
        f"diffusion_model.{layer}.lora_{side}.weight": 0.1 * torch.randn(shape, generator=generator)
        for layer, pair in shapes.items()
        for side, shape in zip(("down", "up"), pair, strict=True)
    }
    save_file(state, base / "models" / "loras" / name)
    return name


def bypass(g, model, name):
    return g.node("LoraLoaderBypassModelOnly", model=model, lora_name=name, strength_model=0.8)


def needs(comfy, node):
    if node not in comfy.nodes.NODE_CLASS_MAPPINGS:
        pytest.skip(f"ComfyUI {comfy.comfyui.version} has no {node}")


def test_a_bypass_lora_of_the_trunk_counts_before_and_after_the_adapter(base, comfy, run, toys):
    needs(comfy, "LoraLoaderBypassModelOnly")
    name = write_lora(base, toys, "bypass.safetensors")
    before, after, without = before_and_after(run, toys, lambda g, model: bypass(g, model, name))
    assert (before - without).abs().max() > 1e-3
    assert torch.allclose(before, after, atol=1e-5)


def test_a_bypass_lora_of_embedder_and_head_counts_before_the_adapter_and_is_refused_after(
    base, comfy, run, fails, toys
):
    needs(comfy, "LoraLoaderBypassModelOnly")
    name = write_lora(base, toys, "bypass_ends.safetensors", ends=True)

    def build(g):
        model = toys.model(g)
        merged = g.node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=0.8)
        put_on = {"bypass": bypass(g, model, name), "merged": merged, "without": model}
        return {key: toys.ksampler(g, toys.adapter(g, value), toys.empty(g)) for key, value in put_on.items()}

    out = {key: value["samples"] for key, value in run(build).items()}
    assert (out["bypass"] - out["without"]).abs().max() > 1e-3
    assert torch.allclose(out["bypass"], out["merged"], atol=1e-5)
    message = fails(lambda g: toys.ksampler(g, bypass(g, toys.adapter(g, toys.model(g)), name), toys.empty(g)))
    assert "bypass LoRA" in message and "before the DA-VAE Adapter" in message


def test_lazy_cache_before_the_adapter_counts_all_channels(run, toys):
    """It cuts what it keeps to as many channels as the MODEL had when the node ran."""
    settings = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    before, after, without = before_and_after(run, toys, lambda g, model: g.node("LazyCache", model=model, **settings))
    assert (after - without).abs().max() > 1e-3
    assert torch.equal(before, after)


def test_a_guidance_function_written_for_the_unadapted_model_is_named(comfy, run, toys):
    """RenormCFG guides as many channels as the MODEL had: the detail would go without."""
    seen = len(comfy.log)
    run(lambda g: {"x": toys.adapter(g, g.node("RenormCFG", model=toys.model(g), cfg_trunc=100.0, renorm_cfg=1.0))})
    log = "\n".join(comfy.log[seen:])
    assert "may not fit" in log and "sampler_cfg_function" in log and "renorm_cfg_func" in log


FITTING = {
    "post cfg": lambda m: m.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9),
    "pre cfg": lambda m: m.set_model_sampler_pre_cfg_function(lambda args: [part * 0.9 for part in args["conds_out"]]),
    "cfg": lambda m: m.set_model_sampler_cfg_function(lambda args: 0.9 * args["cond"]),
    "function wrapper": lambda m: m.set_model_unet_function_wrapper(
        lambda apply, args: 0.9 * apply(args["input"], args["timestep"], **args["c"])
    ),
    "wrapper": lambda m: m.add_wrapper_with_key(
        "predict_noise", "key", lambda executor, *a, **k: 0.9 * executor(*a, **k)
    ),
}


@pytest.mark.parametrize("name", FITTING)
def test_a_function_that_looks_at_its_arguments_alone_is_carried_without_a_word(model, adapt, sample, name):
    before = model.clone()
    FITTING[name](before)
    adapted, log = adapt(before)
    after = adapt(model)[0].clone()
    FITTING[name](after)
    assert "DA-VAE" not in log
    assert torch.equal(sample(adapted), sample(after))
    assert not torch.equal(sample(after), sample(adapt(model)[0]))


class Holder:
    """A pack's object that calls the network of the MODEL it was made for."""

    def __init__(self, model) -> None:
        self.network = model.model.diffusion_model

    def __call__(self, args):
        return args["denoised"]


DOUBTFUL = {
    "sampler_post_cfg_function": lambda m: m.set_model_sampler_post_cfg_function(Holder(m)),
    "wrappers": lambda m: m.add_wrapper_with_key("outer_sample", "key", lambda run, *a, __m=m, **k: run(*a, **k)),
    "callbacks": lambda m: m.add_callback_with_key("on_load_after", "key", lambda *a, __m=m: None),
    "attachments": lambda m: m.set_attachments("key", Holder(m)),
    "patches": lambda m: m.set_model_patch(Holder(m), "a_patch"),
    "a_packs_option": lambda m: m.model_options.update(a_packs_option=1),
    "a_packs_other": lambda m: m.model_options["transformer_options"].update(a_packs_other=1),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_may_not_fit_is_kept_and_named(model, adapt, name):
    patched = model.clone()
    DOUBTFUL[name](patched)
    adapted, log = adapt(patched)
    assert "may not fit" in log and name in log
    options = adapted.model_options
    found = {**options, **options["transformer_options"], **vars(adapted)}
    assert found[name]


def inject(model):
    from comfy.patcher_extension import PatcherInjection

    nothing = PatcherInjection(inject=lambda patcher: None, eject=lambda patcher: None)
    model.set_injections("a_packs_injection", [nothing])


LEFT = {
    "diffusion_model": lambda m: m.add_object_patch("diffusion_model", m.model.diffusion_model),
    "extra_conds": lambda m: m.add_object_patch("extra_conds", m.model.extra_conds),
    "a_packs_injection": inject,
    "weight wrapper diffusion_model.final_layer.linear.weight": lambda m: m.weight_wrapper_patches.update(
        {"diffusion_model.final_layer.linear.weight": [lambda weight: weight[:64]]}
    ),
    "hook patch diffusion_model.x_embedder.proj.weight": lambda m: m.hook_patches.update(
        {"hook": {"diffusion_model.x_embedder.proj.weight": [(1.0, ("diff", (torch.zeros(1),)), 1.0, None, None)]}}
    ),
    "multigpu": lambda m: m.set_additional_models("multigpu", [m.clone()]),
    "multigpu_options": lambda m: m.model_options.update(multigpu_options={"cpu": {"relative_speed": 1.0}}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_belongs_to_the_unadapted_network_is_left_out_and_named(model, adapt, sample, name):
    patched = model.clone()
    LEFT[name](patched)
    adapted, log = adapt(patched)
    assert "left out of the adapted MODEL" in log and name in log
    assert torch.equal(sample(adapted), sample(adapt(model)[0]))


def test_an_attribute_that_nobody_knows_is_named(model, adapt, monkeypatch):
    clone = type(model).clone

    def with_attribute(self, *args, **named):
        made = clone(self, *args, **named)
        made.a_packs_attribute = ["something"]
        return made

    monkeypatch.setattr(type(model), "clone", with_attribute)
    assert "attribute a_packs_attribute" in adapt(model)[1]


def test_every_attribute_of_a_patcher_is_known(comfy, model):
    """One that a newer ComfyUI adds must be put on a list: carried, looked into, or the new patcher's own."""
    carried = comfy.pack("nodes.comfy_bridge.carried")
    assert vars(model).keys() <= {*carried._SETTINGS, *carried._PARTS, *carried._OWN}


def test_the_base_is_unloaded_from_every_device(comfy, model, adapt, monkeypatch):
    """It may be on another than the one ComfyUI works on, and a tensor there is not to be shared."""
    from comfy import model_management as management

    if not hasattr(management, "unload_model_and_clones"):
        pytest.skip("this ComfyUI unloads models wherever they are")
    asked = []
    unload = management.unload_model_and_clones

    def unload_model_and_clones(model, unload_additional_models=True, all_devices=False):
        asked.append(all_devices)
        return unload(model, unload_additional_models, all_devices)

    monkeypatch.setattr(management, "unload_model_and_clones", unload_model_and_clones)
    adapt(model)
    assert asked == [True]


# Copies: deep ones, and the memory that is shared


def storage(patcher):
    return {key: tensor.data_ptr() for key, tensor in patcher.model.named_parameters()}


@pytest.mark.parametrize("loader", ["adapter", "merged"])
def test_a_deep_copy_shares_nothing_can_be_trained_on_and_samples_the_same(run, toys, sample, loader):
    def build(g):
        if loader == "merged":
            return {"m": g.node("DAVAE_ModelLoader", model_name=toys.family.merged_file, dtype="auto")}
        return {"m": toys.adapter(g, toys.model(g))}

    adapted = run(build)["m"]
    make, arguments = adapted.cached_patcher_init  # what ComfyUI calls, in inference mode or not
    with torch.inference_mode():
        copy = make(*arguments, disable_dynamic=True)
    if loader == "adapter":  # a merged file is read anew, in the mode that is on
        assert not any(tensor.is_inference() for tensor in copy.model.parameters())
    copies = [copy]
    if hasattr(adapted, "deepclone_multigpu"):  # for another device; here the only one stands for it
        copies.append(adapted.deepclone_multigpu(adapted.load_device))
    for one in copies:
        assert not set(storage(adapted).values()) & set(storage(one).values())
        assert torch.equal(sample(one), sample(adapted))


def test_comfyuis_train_lora_node_trains_on_the_adapted_model(comfy, run, toys):
    """In fp32 its layers are used as they are, so none of them may have been made in inference mode."""
    needs(comfy, "TrainLoraNode")
    inputs = comfy.nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"].INPUT_TYPES()["required"]
    if "bypass_mode" not in inputs:
        pytest.skip("this ComfyUI's node trains on a clone, and fails on its own models, too")
    widgets = {name: about[1]["default"] for name, about in inputs.items() if "default" in about[1]}
    widgets |= {"steps": 2, "rank": 2, "training_dtype": "fp32", "lora_dtype": "fp32"}

    def build(g):
        adapted = toys.adapter(g, toys.model(g))
        latents, text = g.node("HarnessConstant", key="latent"), toys.conditioning(g)["positive"]
        trained = g.node("TrainLoraNode", model=adapted, latents=latents, positive=text, **widgets)
        return {
            "lora": trained[0],
            "losses": trained[1],
            "after": toys.ksampler(g, adapted, toys.empty(g)),
            "fresh": toys.ksampler(g, toys.adapter(g, toys.model(g)), toys.empty(g)),
        }

    out = run(build, inputs={"latent": {"samples": torch.randn(1, 32, 8, 8)}})
    assert len(out["losses"]["loss"]) == 2 and any("x_embedder" in name for name in out["lora"])
    assert torch.equal(out["after"]["samples"], out["fresh"]["samples"])


def back_from_a_device(patcher):
    """Copies in place of all weights, as they come back from a GPU; where there is one, it makes them."""
    from comfy import model_management as management

    if management.is_device_cpu(management.get_torch_device()):
        with torch.inference_mode():
            for tensor in patcher.model.parameters():
                tensor.data = tensor.data.clone()


def shared(base, adapted):
    """The trunk's share of memory that the two hold together, as a part of 1."""
    theirs, ours = storage(base), storage(adapted)
    sizes = {key: tensor.numel() for key, tensor in base.model.named_parameters() if "final_layer.linear" not in key}
    sizes = {key: size for key, size in sizes.items() if "x_embedder" not in key}
    return sum(size for key, size in sizes.items() if theirs[key] == ours[key]) / sum(sizes.values())


def test_the_trunk_is_shared_after_loading_unloading_and_loading_again(comfy, model, adapt, sample):
    """Measured by address."""
    from comfy import model_management as management

    adapted, _ = adapt(model)
    first = sample(adapted)
    for _ in range(2):
        management.load_models_gpu([adapted], force_full_load=True)
        back_from_a_device(adapted)
        assert shared(model, adapted) < 0.5
        management.unload_all_models()
        assert shared(model, adapted) == 1
    assert torch.equal(sample(adapted), first)


def test_a_base_whose_lora_is_in_use_lends_its_original_weights(base, run, toys, model, adapt, sample):
    """The adapted model is unloaded while the base holds the result of a LoRA in its weights."""
    from comfy import model_management as management

    name = write_lora(base, toys, "in_use.safetensors")
    adapted, _ = adapt(model)
    first = sample(adapted)
    lora = run(
        lambda g: {
            "m": g.node(
                "LoraLoaderModelOnly", model=g.node("HarnessConstant", key="m"), lora_name=name, strength_model=1.0
            )
        },
        inputs={"m": model},
    )["m"]
    management.load_models_gpu([lora, adapted], force_full_load=True)
    back_from_a_device(adapted)
    adapted.detach()
    assert torch.equal(sample(adapted), first)


# The adapter that the sampler itself applies


@pytest.fixture
def applied(comfy, monkeypatch):
    """The adapters that were applied, one name each."""
    kept, names = comfy.pack("nodes.comfy_bridge.kept"), []
    apply = kept.apply_adapter

    def counted(base, adapter, strength, name):
        names.append(name)
        return apply(base, adapter, strength, name)

    monkeypatch.setattr(kept, "apply_adapter", counted)
    return names


def with_adapter(run, toys, model, name, seed):
    def build(g):
        return {"x": toys.sampler(g, g.node("HarnessConstant", key="model"), adapter_name=name, seed=seed)}

    return run(build, inputs={"model": model})["x"]["samples"]


def test_a_new_seed_does_not_apply_the_samplers_adapter_anew(base, run, toys, model, applied):
    file = base / "models" / "loras" / "of_the_sampler.safetensors"
    shutil.copy(file.with_name(toys.family.adapter_file), file)
    first = with_adapter(run, toys, model, file.name, 1)
    other = with_adapter(run, toys, model, file.name, 2)
    assert torch.equal(with_adapter(run, toys, model, file.name, 1), first) and not torch.equal(first, other)
    assert applied == [file.name]

    shutil.copy(file.with_name(toys.family.zero_adapter_file), file)
    assert not torch.equal(with_adapter(run, toys, model, file.name, 1), first)
    assert applied == [file.name] * 2

    lora = model.clone()
    key = "diffusion_model.joint_blocks.0.x_block.attn.proj.weight"
    lora.add_patches({key: ("diff", (torch.ones(128, 128),))})
    with_adapter(run, toys, lora, file.name, 1)
    lora.add_patches({key: ("diff", (torch.ones(128, 128),))})  # the same object, changed
    with_adapter(run, toys, lora, file.name, 1)
    assert applied == [file.name] * 4


def test_what_the_sampler_keeps_goes_with_the_model(comfy, run, toys):
    model = run(lambda g: {"m": toys.model(g)})["m"]
    with_adapter(run, toys, model, toys.family.adapter_file, 1)
    kept = weakref.ref(model.davae_adapted[toys.family.adapter_file][1].model)
    assert kept() is not None and not hasattr(model.clone(), "davae_adapted")
    del model
    comfy.reset_cache()
    run(lambda g: {"m": toys.empty(g)})
    gc.collect()
    assert kept() is None
