"""What ComfyUI is told about the nodes, and attributes that the nodes set on its objects (see also test_contract)."""

from __future__ import annotations

import inspect
import sys

IDS = {
    "DAVAE_Loader", "DAVAE_Adapter", "DAVAE_FewSteps", "DAVAE_ModelLoader", "DAVAE_TinySD35", "DAVAE_DetailEncode",
    "DAVAE_DetailDecode", "DAVAE_EmptyLatent", "DAVAE_FromBaseLatent", "DAVAE_ToBaseLatent", "DAVAE_PredictDetail",
    "DAVAE_Sampler", "DAVAE_RerollDetail", "DAVAE_SwapBase",
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
            outside = {name.split(".")[0] for name in names} - {"torch", "comfy_api", *sys.stdlib_module_names}
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
        assert f"]({name}.jpg)" in text and (docs / f"{name}.jpg").is_file(), f"{name}.md shows no picture"


def test_a_stock_vae_object_still_has_the_attributes_that_are_replaced(comfy, run, toys):
    """An attribute that ComfyUI renamed would be set in vain."""
    seam = comfy.pack("nodes.comfy_bridge.vae")
    fresh = vars(seam._minute_vae())
    ours = vars(run(lambda g: {"vae": toys.davae(g)[0]})["vae"])
    assert set(ours) - set(fresh) == {"stage"}
    assert set(fresh) - set(ours) == {"first_stage_model", "memory_used_encode", "memory_used_decode"}
    for name in ("encode_tiled_", "decode_tiled_"):
        assert callable(inspect.getattr_static(type(seam._minute_vae()), name))


def test_a_model_patcher_still_has_the_attributes_that_belong_to_one_model(comfy, run, toys):
    patcher = vars(run(lambda g: {"model": toys.model(g)})["model"])
    for name in ("model", "backup", "object_patches_backup", "pinned", "parent", "size", "hook_backup", "patches"):
        assert name in patcher, f"ModelPatcher of ComfyUI {comfy.comfyui.version} has no {name}"
