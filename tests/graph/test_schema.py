"""What ComfyUI is told about the nodes, and what the nodes rely on in ComfyUI."""

from __future__ import annotations

import inspect

import pytest

IDS = {
    "DAVAE_Loader", "DAVAE_Adapter", "DAVAE_ModelLoader", "DAVAE_TinySD35", "DAVAE_DetailEncode", "DAVAE_DetailDecode",
    "DAVAE_EmptyLatent", "DAVAE_FromBaseLatent", "DAVAE_ToBaseLatent", "DAVAE_Sampler",
    "DAVAE_RerollDetail", "DAVAE_SwapBase",
}  # fmt: skip


def our_nodes(comfy):
    return {name: node for name, node in comfy.nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("DAVAE_")}


def test_the_nodes_are_there_and_their_ids_do_not_change(comfy):
    """An id is a workflow's permanent name for a node."""
    assert set(our_nodes(comfy)) == IDS


def test_only_the_seam_imports_comfyuis_internals(comfy):
    import ast
    from pathlib import Path

    pack = Path(comfy.base, "custom_nodes", "comfyui-davae", "nodes")
    for file in pack.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            outside = {name.split(".")[0] for name in names} - {"torch", "typing", "comfy_api"}
            assert not outside, f"{file.name} imports {outside}"


def test_every_node_and_every_input_says_what_it_is(comfy):
    for name, node in our_nodes(comfy).items():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.category == "DA-VAE" and schema.display_name, name
        for entry in schema.inputs or []:
            assert entry.tooltip and entry.tooltip.endswith("."), f"{name}.{entry.id}"


def test_every_node_has_a_help_page_that_names_its_inputs(comfy):
    from pathlib import Path

    docs = Path(comfy.base, "custom_nodes", "comfyui-davae", "nodes", "web", "docs")
    for name, node in our_nodes(comfy).items():
        text = (docs / f"{name}.md").read_text(encoding="utf-8")
        schema = node.GET_SCHEMA()
        assert schema.display_name in text.splitlines()[0], name
        for entry in schema.inputs or []:
            assert f"`{entry.id}`" in text, f"{name}.md does not mention {entry.id}"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("comfy.sd.VAE", ["encode_tiled_", "decode_tiled_", "throw_exception_if_invalid"]),
        ("comfy.sd.CLIP", ["tokenize", "encode_from_tokens_scheduled", "load_model"]),
        ("comfy.model_base.SD3", ["extra_conds", "get_dtype", "load_model_weights"]),
        ("comfy.supported_models.SD3", ["get_model", "set_inference_dtype", "supported_inference_dtypes"]),
        ("comfy.latent_formats.SD3", ["process_in", "process_out", "latent_channels"]),
        (
            "comfy.model_patcher.ModelPatcher",
            [
                "clone", "model_state_dict", "add_patches", "set_model_denoise_mask_function", "add_wrapper_with_key",
            ],
        ),
        ("comfy.patcher_extension.WrappersMP", ["OUTER_SAMPLE", "APPLY_MODEL"]),
        ("comfy.model_patcher", ["get_key_weight"]),
        ("comfy.lora", ["load_lora", "model_lora_keys_unet"]),
        ("comfy.model_detection", ["detect_unet_config"]),
        (
            "comfy.model_management",
            [
                "load_models_gpu", "get_free_memory", "intermediate_device", "vae_device", "vae_offload_device",
                "vae_dtype", "dtype_size", "module_size", "soft_empty_cache", "unet_dtype", "unet_manual_cast",
                "unet_offload_device", "get_torch_device", "is_device_cpu", "throw_exception_if_processing_interrupted",
            ],
        ),
        ("comfy.sd1_clip", ["token_weights"]),
        ("nodes", ["common_ksampler"]),
        ("comfy_extras.nodes_model_advanced", ["ModelSamplingSD3"]),
        ("folder_paths", ["add_model_folder_path", "get_full_path", "get_folder_paths", "get_filename_list"]),
    ],
)  # fmt: skip
def test_comfyui_still_has_what_the_seam_uses(comfy, path, names):
    import importlib

    module, _, attribute = path.rpartition(".")
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:
        owner = getattr(importlib.import_module(module), attribute)
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, f"{path} of ComfyUI {comfy.comfyui.version} has no {', '.join(missing)}"


def test_a_stock_vae_object_still_has_the_attributes_that_are_replaced(comfy, run, toys):
    """An attribute that ComfyUI renamed would be set in vain."""
    seam = comfy.pack("nodes.comfy_bridge.autoencoder")
    fresh = vars(seam._minute_vae())
    ours = vars(run(lambda g: {"vae": toys.davae(g)[0]})["vae"])
    assert set(ours) - set(fresh) == {"encode_tiled_", "decode_tiled_"}
    for name in ("encode_tiled_", "decode_tiled_"):
        assert callable(inspect.getattr_static(type(seam._minute_vae()), name))


def test_a_model_patcher_still_has_the_attributes_that_belong_to_one_model(comfy, run, toys):
    patcher = vars(run(lambda g: {"model": toys.model(g)})["model"])
    for name in ("model", "backup", "object_patches_backup", "pinned", "parent", "size", "hook_backup", "patches"):
        assert name in patcher, f"ModelPatcher of ComfyUI {comfy.comfyui.version} has no {name}"
