"""ComfyUI entry point of the DA-VAE node pack. Nothing is imported until ComfyUI asks for the nodes."""

import logging

WEB_DIRECTORY = "./nodes/web"
OLDEST = (0, 3, 75)  # that the tests run on; pyproject.toml says the same


async def comfy_entrypoint():
    """Called by ComfyUI once, at start."""
    from .nodes import DAVAEExtension

    return DAVAEExtension()


def too_old(version: str) -> str:
    """What to tell the user of a ComfyUI of this version; "" where it is new enough or does not tell."""
    parts = version.split(".")[:3]
    if len(parts) < 3 or not all(part.isascii() and part.isdigit() for part in parts):
        return ""
    if tuple(map(int, parts)) >= OLDEST:
        return ""
    oldest = ".".join(map(str, OLDEST))
    return f"DA-VAE needs ComfyUI {oldest} or newer, this is {version}: nodes may be missing or fail. Update ComfyUI"


try:
    from comfyui_version import __version__ as _comfyui
except ImportError:  # not in ComfyUI
    pass
else:
    if words := too_old(_comfyui):
        logging.warning(words)
