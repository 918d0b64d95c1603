"""A scratch ComfyUI base directory: models, input, output and user folders of its own, with this pack as a custom node.

ComfyUI is told of it with `--base-directory` and then loads custom nodes from there alone, so nothing of the user's own
installation takes part in a test.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

PROBE = Path(__file__).resolve().parent / "probe"
PROBE_NAME = "comfyui-harness-probe"

FOLDERS = ["custom_nodes", "input", "output", "temp", "user/default"]
MODELS = ["checkpoints", "clip", "clip_vision", "configs", "controlnet", "diffusion_models", "embeddings", "loras"]
MODELS += ["latent_upscale_models", "text_encoders", "unet", "upscale_models", "vae", "vae_approx"]

# The template browser would cover the canvas at the first start. "Nodes 2.0" is how newer front ends can draw nodes.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": os.environ.get("DAVAE_NODES2") == "1"}

# What a copy (where no link is possible) leaves out.
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "output")


def make_base(
    path: Path,
    pack_root: Path | None,
    install_name: str = "comfyui-davae",
    extra_packs: Iterable[Path] = (),
    probe: bool = True,
) -> Path:
    """Makes (or completes) the base directory `path` and returns it.

    Args:
        path: the folder to make.
        pack_root: the repository of the pack, linked as `custom_nodes/<install_name>`; None for a base without it.
        install_name: the folder name under custom_nodes.
        extra_packs: more custom-node folders, linked under their own names.
        probe: also link the test-only nodes; the headless runner needs them.
    """
    path = Path(path).resolve()
    for folder in [*FOLDERS, *(f"models/{name}" for name in MODELS)]:
        (path / folder).mkdir(parents=True, exist_ok=True)
    settings = path / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    packs = {Path(pack).name: Path(pack) for pack in extra_packs}
    if probe:
        packs[PROBE_NAME] = PROBE
    if pack_root is not None:
        packs[install_name] = Path(pack_root)
    for name, folder in packs.items():
        _link(folder.resolve(), path / "custom_nodes" / name)
    return path


def _link(folder: Path, link: Path) -> None:
    """Links `link` to `folder`: a symbolic link, else (Windows without that right) a junction, else a copy."""
    if link.exists() or link.is_symlink():
        return
    try:
        link.symlink_to(folder, target_is_directory=True)
        return
    except OSError:
        pass
    if os.name == "nt":
        import _winapi

        try:
            _winapi.CreateJunction(str(folder), str(link))
            return
        except OSError:
            pass
    shutil.copytree(folder, link, ignore=NOT_COPIED)
