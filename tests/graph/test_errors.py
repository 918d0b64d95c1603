"""Wrong input: each has its own message, which names what was given, what was expected and what to do."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from davae_core import checkpoints
from harness.untrained import Family


def decode(g, toys, samples):
    return g.node("DAVAE_DetailDecode", samples=samples, davae=toys.davae(g)[2], detail_strength=1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("sampler_name", "eulr"), ("scheduler", "simpel"), ("scheduler", 5), ("size_rule", "Crop")]
)
@pytest.mark.parametrize("linked", [False, True])
def test_a_misspelt_value_of_a_list_is_named(fails, toys, picture, name, value, linked):
    """ComfyUI 0.3.75 does not check them in our nodes, and no ComfyUI checks what comes over a link."""

    def build(g):
        given = {name: g.node("HarnessConstant", key="value") if linked else value}
        if name == "size_rule":
            image = g.node("HarnessConstant", key="image")
            return g.node("DAVAE_DetailEncode", image=image, davae=toys.davae(g)[2], **given)
        return toys.sampler(g, toys.adapter(g, toys.model(g)), **given)

    message = fails(build, inputs={"image": picture, "value": value})
    assert str(value) in message and name in message


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("DAVAE_Loader", "davae_name"), ("DAVAE_Adapter", "adapter_name"), ("DAVAE_ModelLoader", "model_name"),
        ("DAVAE_FewSteps", "lora_name"), ("DAVAE_PredictDetail", "predictor_name"), ("DAVAE_Sampler", "adapter_name"),
    ],
)  # fmt: skip
def test_a_prompt_without_the_file_is_told_which_input_is_missing(fails, toys, node, name):
    def build(g):
        made = toys.sampler(g, toys.model(g)) if node == "DAVAE_Sampler" else g.node(node)
        g.prompt[made.id]["inputs"].pop(name, None)
        return made

    message = fails(build)
    assert "Required input is missing" in message and name in message and "validate_inputs" not in message


def test_an_ordinary_latent_in_detail_decode(fails, toys):
    message = fails(lambda g: decode(g, toys, g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)))
    assert "16 channels" in message and "32 (16 base + 16 detail)" in message and "Base to DA-VAE Latent" in message


def test_a_latent_of_another_kind_in_stock_vae_decode(fails, toys):
    message = fails(
        lambda g: g.node(
            "VAEDecode", samples=g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1), vae=toys.davae(g)[0]
        )
    )
    assert "[1, 16, 8, 8]" in message and "32" in message


def test_a_davae_latent_in_the_base_vae(fails, toys):
    message = fails(lambda g: g.node("VAEDecode", samples=toys.empty(g), vae=toys.davae(g)[1]))
    assert "16 channels" in message and "has 32" in message and "DA-VAE to Base Latent" in message


def test_an_unadapted_model_in_our_sampler(fails, toys):
    message = fails(lambda g: toys.sampler(g, toys.model(g), latent=toys.empty(g)))
    assert "not adapted" in message and "16 latent channels" in message and "DA-VAE Adapter" in message


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_an_ordinary_latent_for_an_adapted_model(fails, toys, kind):
    def build(g):
        model = toys.adapter(g, toys.model(g))
        latent = g.node("HarnessConstant", key="latent")
        return toys.ksampler(g, model, latent) if kind == "stock" else toys.sampler(g, model, latent=latent)

    message = fails(build, inputs={"latent": {"samples": torch.randn(1, 16, 8, 8)}})
    assert "16 channels" in message and "32 (16 base + 16 detail)" in message and "Empty DA-VAE Latent" in message


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_an_absurd_size(fails, toys, kind):
    def build(g):
        model = toys.adapter(g, toys.model(g))
        size = {"width": 16384, "height": 32}
        return toys.ksampler(g, model, toys.empty(g, **size)) if kind == "stock" else toys.sampler(g, model, **size)

    message = fails(build)
    assert "16384 x 32 px" in message and "768 px" in message and "smaller" in message


@pytest.mark.parametrize("size", [0, -64, 10**9])
def test_sizes_outside_of_the_widgets_range_are_refused_before_anything_runs(fails, toys, size):
    message = fails(lambda g: toys.empty(g, width=size))
    assert "width" in message and str(size) in message


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_conditioning_of_another_text_encoder(fails, toys, kind):
    def build(g):
        model = toys.adapter(g, toys.model(g))
        other = g.node("HarnessConditioning", context=77, pooled=toys.family.model.pooled, seed=0)
        node = toys.ksampler(g, model, toys.empty(g)) if kind == "stock" else toys.sampler(g, model)
        g.prompt[node.id]["inputs"]["positive"] = other[0]
        return node

    message = fails(build)
    assert "width 77" in message and "64" in message and "text encoders" in message


def test_conditioning_without_a_pooled_vector(fails, toys):
    def build(g):
        node = toys.sampler(g, toys.adapter(g, toys.model(g)))
        g.prompt[node.id]["inputs"]["negative"] = g.node("HarnessConstant", key="bare")[0]
        return node

    message = fails(build, inputs={"bare": [[torch.zeros(1, 8, toys.family.model.context), {}]]})
    assert "pooled vector of width 0" in message


def test_an_sdxl_model_for_the_adapter(fails, toys):
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL({
        "image_size": 32, "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
        "adm_in_channels": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "transformer_depth": [0, 1], "channel_mult": [1, 2], "transformer_depth_middle": 1,
        "use_linear_in_transformer": True, "context_dim": 32, "transformer_depth_output": [0, 0, 1, 1],
        "use_temporal_attention": False, "use_temporal_resblock": False, "dtype": torch.float32,
    })  # fmt: skip
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(config.get_model({}), load_device=cpu, offload_device=cpu)
    message = fails(lambda g: toys.adapter(g, g.node("HarnessConstant", key="model")), inputs={"model": model})
    assert "SDXL" in message and "4 latent channels" in message and "Load SD3.5-medium" in message


def test_an_adapted_model_for_the_adapter(fails, toys):
    message = fails(lambda g: toys.adapter(g, toys.adapter(g, toys.model(g))))
    assert "already" in message and "32 latent channels" in message


def test_an_adapter_of_another_width(base, fails, toys):
    wide = Family(model=replace(toys.family.model, hidden=192, depth=3))
    checkpoints.save_adapter(base / "models" / "loras" / "wide_adapter.safetensors", wide.adapter())
    message = fails(
        lambda g: g.node("DAVAE_Adapter", model=toys.model(g), adapter_name="wide_adapter.safetensors", strength=1.0)
    )
    assert "width 192" in message and "width 128" in message and "trained for" in message


def test_an_adapter_of_a_deeper_model(base, fails, toys):
    deep = Family(model=replace(toys.family.model, depth=4))
    checkpoints.save_adapter(base / "models" / "loras" / "deep_adapter.safetensors", deep.adapter())
    message = fails(
        lambda g: g.node("DAVAE_Adapter", model=toys.model(g), adapter_name="deep_adapter.safetensors", strength=1.0)
    )
    assert "24 layers" in message and "only 12" in message


def broken_files(vae, toys):
    """Bad DA-VAE files by name."""
    good = vae / toys.family.davae_file
    data = good.read_bytes()
    (vae / "truncated.safetensors").write_bytes(data[: len(data) // 2])
    (vae / "garbage.safetensors").write_bytes(b"not a safetensors file" * 1000)
    (vae / "empty.safetensors").write_bytes(b"")
    torch.save({"a": torch.zeros(1)}, vae / "pickled.pt")
    plain = {f"encoder.{key}": value for key, value in toys.family.davae().base_encoder.state_dict().items()}
    plain |= {f"decoder.{key}": value for key, value in toys.family.davae().base_decoder.state_dict().items()}
    save_file(plain, vae / "plain_sd3_vae.safetensors")
    model = toys.family.davae()
    with torch.no_grad():
        model.joint_up.conv.weight[0, 0, 0, 0] = float("nan")
    checkpoints.save_autoencoder(vae / "nan.safetensors", model)
    shutil.copy(good.parent.parent / "loras" / toys.family.adapter_file, vae / "an_adapter.safetensors")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated.safetensors", ["truncated.safetensors", "cut off", "again"]),
        ("garbage.safetensors", ["garbage.safetensors", "not a readable safetensors file"]),
        ("empty.safetensors", ["empty.safetensors", "0 bytes"]),
        ("pickled.pt", ["pickled.pt", "run code", "Convert it to safetensors"]),
        ("plain_sd3_vae.safetensors", ["a plain VAE with 16 latent channels", "DA-VAE autoencoder", "models/vae"]),
        ("nan.safetensors", ["nan.safetensors", "joint_up.conv.weight", "NaN", "another file"]),
        ("an_adapter.safetensors", ["a DA-VAE adapter", "models/vae"]),
        ("missing.safetensors", ["'missing.safetensors' was not found", "models/vae", "Put it there"]),
    ],
)
def test_a_bad_file_in_the_davae_loader(base, fails, toys, name, words):
    broken_files(base / "models" / "vae", toys)
    message = fails(lambda g: g.node("DAVAE_Loader", davae_name=name, dtype="auto"))
    assert all(word in message for word in words), message


def test_a_missing_adapter_says_where_it_belongs(fails, toys):
    message = fails(
        lambda g: g.node("DAVAE_Adapter", model=toys.model(g), adapter_name="gone.safetensors", strength=1.0)
    )
    assert "'gone.safetensors' was not found" in message and "models/loras" in message
    message = fails(lambda g: toys.sampler(g, toys.model(g), adapter_name="gone.safetensors"))
    assert "'gone.safetensors' was not found" in message and "models/loras" in message


def test_a_lora_where_an_adapter_is_wanted(base, fails, toys):
    save_file(toys.family.adapter().lora_state(), base / "models" / "loras" / "just_a_lora.safetensors")
    message = fails(
        lambda g: g.node("DAVAE_Adapter", model=toys.model(g), adapter_name="just_a_lora.safetensors", strength=1.0)
    )
    assert "just_a_lora.safetensors is a LoRA" in message and "DA-VAE adapter" in message


def test_an_unadapted_model_where_a_merged_one_is_wanted(fails, toys):
    message = fails(lambda g: g.node("DAVAE_ModelLoader", model_name=toys.family.model_file, dtype="auto"))
    assert "an unadapted SD3 / SD3.5 diffusion model with 16 channels" in message and "merged" in message


def test_a_base_latent_that_does_not_fit_the_image(fails, toys, picture):
    def build(g):
        image, base = g.node("HarnessConstant", key="image"), g.node("HarnessConstant", key="base")
        return g.node("DAVAE_DetailEncode", image=image, davae=toys.davae(g)[2], size_rule="pad", base_latent=base)[0]

    message = fails(build, inputs={"image": picture, "base": {"samples": torch.zeros(1, 16, 4, 4)}})
    assert "[1, 16, 4, 4]" in message and "[1, 16, 8, 12]" in message and "96 x 64 px" in message


def test_a_picture_too_small_to_crop(fails, toys):
    def build(g):
        image = g.node("HarnessConstant", key="image")
        return g.node("DAVAE_DetailEncode", image=image, davae=toys.davae(g)[2], size_rule="crop")[0]

    message = fails(build, inputs={"image": torch.zeros(1, 20, 500, 3)})
    assert "500 x 20" in message and "32" in message


def test_a_davae_latent_where_an_ordinary_one_is_wanted(fails, toys):
    message = fails(lambda g: g.node("DAVAE_FromBaseLatent", samples=toys.empty(g)))
    assert "[1, 32, 8, 8]" in message and "16" in message


def test_a_grey_image(fails, toys):
    def build(g):
        image = g.node("HarnessConstant", key="image")
        return g.node("DAVAE_DetailEncode", image=image, davae=toys.davae(g)[2], size_rule="pad")[0]

    message = fails(build, inputs={"image": torch.zeros(1, 64, 64, 1)})
    assert "1 channels" in message and "red, green and blue" in message


def test_a_video_latent(fails, toys):
    def build(g):
        return toys.ksampler(g, toys.adapter(g, toys.model(g)), g.node("HarnessConstant", key="video"))

    message = fails(build, inputs={"video": {"samples": torch.randn(1, 32, 2, 8, 8)}})
    assert "[1, 32, 2, 8, 8]" in message and "Empty DA-VAE Latent" in message


def test_an_area_outside_of_the_latent(fails, toys):
    def build(g):
        node = toys.ksampler(g, toys.adapter(g, toys.model(g)), toys.empty(g))
        positive = g.prompt[node.id]["inputs"]["positive"]
        area = g.node("ConditioningSetArea", conditioning=positive, width=64, height=64, x=64, y=0, strength=1.0)
        g.prompt[node.id]["inputs"]["positive"] = area[0]
        return node

    assert "Set Area with Percentage" in fails(build)


def test_a_controlnet(fails, toys):
    import comfy.controlnet

    def build(g):
        node = toys.ksampler(g, toys.adapter(g, toys.model(g)), toys.empty(g))
        g.prompt[node.id]["inputs"]["positive"] = g.node("HarnessConstant", key="controlled")[0]
        return node

    family = toys.family.model
    control = comfy.controlnet.ControlBase()
    extras = {"pooled_output": torch.zeros(1, family.pooled), "control": control, "control_apply_to_uncond": True}
    message = fails(build, inputs={"controlled": [[torch.zeros(1, 8, family.context), extras]]})
    assert "ControlNet" in message and "16 channels" in message
