"""Makes the pictures of the help pages: what the workflows of the tiny models draw, side by side.

    python -m harness.help_pictures

Each goes beside the page that shows it, as nodes/web/docs/NODE.jpg.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from davae_core import checkpoints, tiny
from davae_core.adapter import merge
from davae_core.checkpoints import files

from . import workflow
from .demo import FOLDER
from .headless import HeadlessComfy
from .locate import REPOSITORY, find_comfyui
from .scratch import make_base
from .sheet import contact_sheet

DOCS = REPOSITORY / "nodes" / "web" / "docs"
QUALITY = 85
COLUMNS = 3
MERGED = "davae_tiny_merged.safetensors"
SIZES = ((128, 128), (192, 128), (128, 192))
SUBJECT = "twitter pizza"  # with small things in it, for what detail is about
PROMPTS = ("3d peach", "noto fox", "twitter rocket", "twitter pizza", "flat castle", "noto guitar")

# By node: workflows, and the titles of their nodes whose pictures are shown.
SHOWN: dict[str, list[tuple[str, Sequence[str]]]] = {
    "DAVAE_Adapter": [("tiny_native", ["Base model alone"]), ("tiny_davae", ["With DA-VAE"])],
    "DAVAE_DetailDecode": [("tiny_detail_strength", [f"Detail strength {v}" for v in ("0", "0.5", "1", "1.5")])],
    "DAVAE_DetailEncode": [("tiny_roundtrip", ["Before", "Encoded and decoded again"])],
    "DAVAE_Loader": [("tiny_roundtrip", ["Before", "Its base, half the size", "Encoded and decoded again"])],
    "DAVAE_FewSteps": [("tiny_fast", ["1 step", "2 steps", "4 steps", "30 steps, without the LoRA"])],
    "DAVAE_FromBaseLatent": [("tiny_twice_the_size", ["Bicubic", "No detail"])],
    "DAVAE_PredictDetail": [("tiny_twice_the_size", ["Bicubic", "No detail", "Predicted detail"])],
    "DAVAE_RerollDetail": [("tiny_reroll_detail", ["Before", "Other detail"])],
    "DAVAE_SwapBase": [("tiny_swap_base", ["Before", "New base, old detail"])],
    "DAVAE_ToBaseLatent": [("tiny_roundtrip", ["Before", "Its base, half the size"])],
}


def load(comfy: HeadlessComfy, name: str, **values: dict[str, object]) -> workflow.Prompt:
    """A workflow, with other values in the nodes of these titles or classes."""
    prompt = workflow.load(FOLDER / f"{name}.json", comfy.nodes)
    for node, widgets in values.items():
        prompt = workflow.with_values(prompt, node, **widgets)
    return prompt


def run(comfy: HeadlessComfy, prompt: workflow.Prompt) -> dict[str, Image.Image]:
    """The pictures of a prompt by the titles of their nodes."""
    saved = workflow.pictures(prompt, comfy.run(prompt).outputs, comfy.base)
    return {title: Image.open(file).convert("RGB") for title, file in saved.items()}


def merged(comfy: HeadlessComfy) -> workflow.Prompt:
    """``tiny_davae`` with a merged model: the tiny base and adapter in one file, read by DA-VAE Model Loader."""
    base, _ = files.read(tiny.FOLDERS["diffusion_models"] / tiny.MODEL)
    adapter = checkpoints.load_adapter(tiny.FOLDERS["loras"] / tiny.ADAPTER)
    model = checkpoints.MergedModel(merge(base, adapter), adapter.config.latent, adapter.config.recommended)
    checkpoints.save_merged(comfy.base / "models" / "diffusion_models" / MERGED, model)
    prompt = load(comfy, "tiny_davae", Prompt={"text": SUBJECT})
    node = prompt[workflow.find(prompt, "DAVAE_Adapter")]
    node |= {"class_type": "DAVAE_ModelLoader", "inputs": {"model_name": MERGED, "dtype": "auto"}}
    return prompt


def main(argv: list[str] | None = None) -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(prog="python -m harness.help_pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for the pictures (default: the help pages')")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="davae-help-") as folder:
        comfy = HeadlessComfy(make_base(Path(folder), REPOSITORY), find_comfyui())
        drawn = {
            name: run(comfy, load(comfy, name, Prompt={"text": SUBJECT}))
            for name in {name for parts in SHOWN.values() for name, _ in parts}
        }
        rows = {
            node: [(title, drawn[name][title]) for name, titles in parts for title in titles]
            for node, parts in SHOWN.items()
        }
        rows["DAVAE_TinySD35"] = [
            (text, run(comfy, load(comfy, "tiny_native", Prompt={"text": text}))["Base model alone"])
            for text in PROMPTS
        ]
        rows["DAVAE_Sampler"] = [
            (text, run(comfy, load(comfy, "tiny_davae", Prompt={"text": text}))["With DA-VAE"]) for text in PROMPTS
        ]
        rows["DAVAE_ModelLoader"] = [
            ("Base model and adapter", drawn["tiny_davae"]["With DA-VAE"]),
            ("Merged into one file", run(comfy, merged(comfy))["With DA-VAE"]),
        ]
        rows["DAVAE_EmptyLatent"] = [
            (f"{width} x {height}", run(comfy, load(comfy, "tiny_kernel", DAVAE_EmptyLatent=size))["Save Image"])
            for width, height in SIZES
            if (size := {"width": width, "height": height})
        ]
    for node, row in rows.items():
        path = options.out / f"{node}.jpg"
        columns = len(row) if len(row) <= COLUMNS + 1 else COLUMNS
        sheet = contact_sheet([("", row[i : i + columns]) for i in range(0, len(row), columns)])
        sheet.save(path, quality=QUALITY, optimize=True)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
