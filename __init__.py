"""ComfyUI entry point of the DA-VAE node pack. Nothing is imported until ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """Called by ComfyUI once, at start."""
    from .nodes import DAVAEExtension

    return DAVAEExtension()
