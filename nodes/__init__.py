"""What appears in the graph: schema and wiring. The mathematics is in davae_core, ComfyUI internals in comfy_bridge."""

from comfy_api.latest import ComfyExtension, io

from . import comfy_bridge, controls, detail, few_steps, loaders, predicting, sampling


class DAVAEExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Called by ComfyUI once, at start."""
        comfy_bridge.register_folders()
        comfy_bridge.install_previews()
        return [*loaders.NODES, *few_steps.NODES, *detail.NODES, *predicting.NODES, *sampling.NODES, *controls.NODES]
