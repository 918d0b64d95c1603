"""The adapter on base models as users have them: other dtypes, quantised files, whole checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from davae_core import checkpoints

SCALED = "toy_scaled_fp8.safetensors"
CHECKPOINT = "toy_checkpoint.safetensors"

# ComfyUI computes in half precision with such files on some versions: sums in another order then differ by this much.
HALF = 2e-3


def sampled(run, toys, load):
    """The base model's latent, and the step-0 adapted model's base channels."""

    def build(g):
        model = load(g)
        native = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        return {
            "base": toys.ksampler(g, toys.shifted(g, model), native),
            "zero": toys.ksampler(g, toys.adapter(g, model, zero=True), toys.empty(g)),
            "adapted": toys.ksampler(g, toys.adapter(g, model), toys.empty(g)),
        }

    out = {key: value["samples"] for key, value in run(build).items()}
    assert out["adapted"].isfinite().all()
    assert (out["adapted"][:, :16] - out["base"]).abs().max() > 1e-2
    return out["base"], out["zero"][:, :16]


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_a_model_loaded_as_fp8(run, toys, weight_dtype):
    base, zero = sampled(
        run, toys, lambda g: g.node("UNETLoader", unet_name=toys.family.model_file, weight_dtype=weight_dtype)
    )
    assert (zero - base).abs().max() <= HALF


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with a LoRA in use"])
def test_a_scaled_fp8_file(base, run, toys, with_lora):
    """The layout of published fp8 files: matrices in float8 with one scale each."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in toys.family.diffusion_model().state_dict().items():
        if name.endswith(".weight") and tensor.ndim == 2 and name.startswith(("joint_blocks.", "final_layer.linear")):
            scale = tensor.abs().max() / 448
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[name.replace(".weight", ".scale_weight")] = scale
        else:
            state[name] = tensor
    state["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(state, base / "models" / "diffusion_models" / SCALED)
    hidden = toys.family.model.hidden
    lora = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(2, hidden)}
    lora["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = 0.1 * torch.randn(hidden, 2)
    save_file(lora, base / "models" / "loras" / "small_lora.safetensors")

    def load(g):
        model = g.node("UNETLoader", unet_name=SCALED, weight_dtype="default")
        if not with_lora:
            return model
        return g.node("LoraLoaderModelOnly", model=model, lora_name="small_lora.safetensors", strength_model=1.0)

    latents = sampled(run, toys, load)
    # With a LoRA the trunk is rounded to float8 again, at random.
    assert (latents[1] - latents[0]).abs().max() <= (0.05 if with_lora else HALF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_checkpoint_in_half_precision(base, run, toys, dtype):
    """CheckpointLoaderSimple, as the SD3.5 workflows use it."""
    state = {
        f"model.diffusion_model.{name}": tensor.to(dtype)
        for name, tensor in toys.family.diffusion_model().state_dict().items()
    }
    name = f"{dtype}".removeprefix("torch.") + CHECKPOINT
    save_file(state, base / "models" / "checkpoints" / name)
    latents = sampled(run, toys, lambda g: g.node("CheckpointLoaderSimple", ckpt_name=name))
    assert (latents[1] - latents[0]).abs().max() <= HALF


def test_a_replaced_file_is_loaded_anew(base, run, toys):
    path = base / "models" / "loras" / "changing.safetensors"

    def latent():
        def build(g):
            model = g.node("DAVAE_Adapter", model=toys.model(g), adapter_name=path.name, strength=1.0)
            return {"latent": toys.ksampler(g, model, toys.empty(g))}

        return run(build)["latent"]["samples"]

    checkpoints.save_adapter(path, toys.family.adapter(zero=True))
    first = latent()
    checkpoints.save_adapter(path, toys.family.adapter())
    assert not torch.allclose(latent(), first, atol=1e-3)
