"""Quantised base models of GGUF loaders: with the loader of ComfyUI-GGUF itself where it is, and layers like its own.

pip install gguf; git clone https://github.com/city96/ComfyUI-GGUF
COMFYUI_GGUF=ComfyUI-GGUF python -m pytest tests/graph/test_gguf.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PACK = os.environ.get("COMFYUI_GGUF")
CLOSE = 1e-4  # sums in another order


@pytest.fixture
def pack(comfy):
    """``pack(module)``: a module of ComfyUI-GGUF."""
    pytest.importorskip("gguf")
    if not PACK:
        pytest.skip("no ComfyUI-GGUF: set COMFYUI_GGUF to its folder")
    name, file = "comfyui_gguf", Path(PACK, "__init__.py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[PACK])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return lambda module: sys.modules[f"{name}.{module}"]


def write_gguf(path: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    """A file in city96's layout: matrices are quantised, the head among them, and nothing else."""
    import gguf

    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), "sd3")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            data = gguf.quants.quantize(tensor.numpy(), quantisation)
            writer.add_tensor(name, data, raw_dtype=quantisation)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_lora(base, toys) -> str:
    """A LoRA of a layer of the trunk and of the head."""
    hidden, generator, lora = toys.family.model.hidden, torch.Generator().manual_seed(3), {}
    for layer, rows in {"joint_blocks.0.x_block.attn.proj": hidden, "final_layer.linear": 64}.items():
        lora[f"diffusion_model.{layer}.lora_up.weight"] = 0.1 * torch.randn(rows, 2, generator=generator)
        lora[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(2, hidden, generator=generator)
    save_file(lora, base / "models" / "loras" / "on_quantised.safetensors")
    return "on_quantised.safetensors"


def compare(base, run, toys, model, values, name, lora=None):
    """Assert that a quantised MODEL samples what the values it holds sample, adapted and as it is, in turn."""
    file = f"values_of_{name}.safetensors"
    save_file(values, base / "models" / "diffusion_models" / file)

    def build(g):
        native = g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        sources = {
            "quantised": g.node("HarnessConstant", key="model"),
            "values": g.node("UNETLoader", unet_name=file, weight_dtype="default"),
        }
        made = {}
        for key, source in sources.items():
            if lora:
                source = g.node("LoraLoaderModelOnly", model=source, lora_name=lora, strength_model=1.0)
            made[f"{key} adapted"] = toys.ksampler(g, toys.adapter(g, source), toys.empty(g))
            made[f"{key} base"] = toys.ksampler(g, toys.shifted(g, source), native)
            made[f"{key} zero"] = toys.ksampler(g, toys.adapter(g, source, zero=True), toys.empty(g))
        return made

    for _ in range(2):  # once more with all of them loaded already
        out = {key: value["samples"] for key, value in run(build, inputs={"model": model}).items()}
        for key in ("adapted", "zero", "base"):
            assert (out[f"quantised {key}"] - out[f"values {key}"]).abs().max() <= CLOSE, key
        assert (out["values adapted"] - out["values zero"]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with a LoRA"])
def test_a_gguf_file_is_adapted_as_the_values_it_holds(base, run, toys, pack, kind, with_lora):
    file = base / "models" / "diffusion_models" / f"toy_{kind}.gguf"
    write_gguf(file, toys.family.diffusion_model().state_dict(), kind)
    with torch.inference_mode():
        model = pack("nodes").UnetLoaderGGUF().load_unet(file.name)[0]
        held = pack("loader").gguf_sd_loader(str(file))
        values = {name: pack("dequant").dequantize_tensor(tensor, torch.float32) for name, tensor in held.items()}
    values = {name: tensor.as_subclass(torch.Tensor).clone() for name, tensor in values.items()}
    compare(base, run, toys, model, values, kind, write_lora(base, toys) if with_lora else None)


# Without the pack: layers that do what those of GGUF loaders do


class Packed(torch.Tensor):
    """Half of a weight, in half precision. It gives itself for a copy, and carries its LoRA."""

    def clone(self, *_, **__):
        return self

    def detach(self, *_, **__):
        return self


def pack_weight(weight: torch.Tensor) -> Packed:
    made = (weight / 2).half().as_subclass(Packed)
    made.tensor_type, made.patches = "half", []
    return made


def packed_layers():
    """Operations for ComfyUI's loader, with linear layers that show it their sizes alone."""
    import comfy.ops

    class Packing(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def _load_from_state_dict(self, state, prefix, *_):
                self.weight = torch.nn.Parameter(state[f"{prefix}weight"], requires_grad=False)
                self.bias = torch.nn.Parameter(state[f"{prefix}bias"], requires_grad=False)

            def _save_to_state_dict(self, destination, prefix, _):
                for name in ("weight", "bias"):
                    destination[prefix + name] = torch.empty(getattr(self, name).shape, device="meta")
                destination[f"{prefix}temp.weight"] = torch.empty(1, device="meta")

            def get_weight(self, tensor, dtype):
                return tensor.as_subclass(torch.Tensor).to(dtype) * 2 if type(tensor) is Packed else tensor

            def convert_weight(self, weight, inplace=False):
                return self.get_weight(weight, torch.float32)

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False):
                self.weight = torch.nn.Parameter(weight, requires_grad=False)

            def forward(self, x):
                return torch.nn.functional.linear(x, self.get_weight(self.weight, x.dtype), self.bias)

    return Packing


def packed_model(toys):
    """A MODEL of such layers, and the values that it holds."""
    import comfy.sd

    network = toys.family.diffusion_model()
    linear = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    values = network.state_dict()
    values |= {name: pack_weight(values[name]).as_subclass(torch.Tensor).float() * 2 for name in linear}
    state = {name: pack_weight(tensor) if name in linear else tensor for name, tensor in values.items()}
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(state, {"custom_operations": packed_layers()}), values


def test_layers_that_show_their_sizes_alone_are_adapted_as_the_values_they_hold(base, comfy, run, toys):
    model, values = packed_model(toys)
    compare(base, run, toys, model, values, "packed")
    adapted = run(lambda g: {"m": toys.adapter(g, g.node("HarnessConstant", key="m"))}, inputs={"m": model})["m"]
    make, arguments = adapted.cached_patcher_init
    deep = make(*arguments, disable_dynamic=True)
    layer = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    theirs, ours, own = (patcher.model.get_submodule(layer).weight for patcher in (model, adapted, deep))
    assert theirs.data_ptr() == ours.data_ptr() != own.data_ptr()
    assert ours.patches is not theirs.patches  # where such a loader puts a LoRA
    assert torch.equal(theirs.as_subclass(torch.Tensor), own.as_subclass(torch.Tensor))


def test_weights_that_cannot_be_read_are_named_with_what_to_use(fails, toys):
    model, _ = packed_model(toys)
    layer = model.model.diffusion_model.joint_blocks[1].x_block.attn.proj
    layer.weight = torch.nn.Parameter(layer.weight.as_subclass(torch.Tensor).to("meta"), requires_grad=False)
    message = fails(lambda g: toys.adapter(g, g.node("HarnessConstant", key="m")), inputs={"m": model})
    assert "joint_blocks.1.x_block.attn.proj.weight" in message and "safetensors" in message
