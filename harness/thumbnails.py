"""Makes the picture beside each workflow file: what ComfyUI's page shows when the workflow has run.

    python -m harness.thumbnails

ComfyUI's template browser shows these. The workflows for SD3.5 and FLUX.1 are shown as they are before a run. Needs a
Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from . import flux, sd35, workflow
from .browser import ComfyPage, open_comfy
from .demo import FOLDER
from .locate import REPOSITORY, find_comfyui
from .scratch import SETTINGS, make_base
from .server import RealServer

# Room for the page's own bars: left, top, right, bottom.
MARGINS = (90, 220, 60, 110)
WIDTH, QUALITY = 1600, 82
# Nothing over the canvas that can be left out.
BARE = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}

# Nodes and groups at full size, the top left corner at the given place.
SHOW = """
([x, y, left, top]) => {
  const canvas = window.app.canvas;
  canvas.deselectAll?.();
  canvas.ds.scale = 1;
  canvas.ds.offset = [left - x, top - y];
  canvas.setDirty(true, true);
}
"""


def bounds(content: dict) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of everything in a workflow file, in pixels of the canvas."""
    boxes = [group["bounding"] for group in content["groups"]]
    boxes += [[node["pos"][0], node["pos"][1] - 30, *node["size"]] for node in content["nodes"]]  # 30: the title bar
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    return left, top, max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)


def window(content: dict) -> tuple[int, int]:
    """Width and height of a window that shows all of a workflow."""
    left, top, right, bottom = bounds(content)
    return round(right - left) + MARGINS[0] + MARGINS[2], round(bottom - top) + MARGINS[1] + MARGINS[3]


def picture(page: ComfyPage, content: dict, folder: Path) -> Image.Image:
    """The workflow that is open on the page, without the page's own bars."""
    left, top, right, bottom = bounds(content)
    page.page.evaluate(SHOW, [left, top, MARGINS[0], MARGINS[1]])
    shot = Image.open(page.screenshot(folder / "page.png", settle=2.0)).convert("RGB")
    edge = 10
    box = (MARGINS[0] - edge, MARGINS[1] - edge, *(round(v) + edge for v in (right - left, bottom - top)))
    box = (box[0], box[1], box[2] + MARGINS[0], box[3] + MARGINS[1])
    cut = shot.crop(box)
    return cut.resize((WIDTH, round(cut.height * WIDTH / cut.width)), Image.Resampling.LANCZOS)


def _example(server: RealServer, output: Path) -> Path:
    """What Load Image nodes show: a picture that the tiny model draws."""
    prompt = workflow.to_prompt(workflow.read(FOLDER / "tiny_davae.json"), server.object_info())
    (image,) = server.queue(workflow.with_values(prompt, "Prompt", text="3d house")).saved_images()
    return output / image["subfolder"] / image["filename"]


def main(argv: list[str] | None = None) -> int:
    """Write ``NAME.jpg`` beside each ``NAME.json``."""
    parser = argparse.ArgumentParser(prog="python -m harness.thumbnails", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder for the pictures (default: workflows)")
    parser.add_argument("names", nargs="*", help="workflows (default: all)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="davae-thumbnails-") as folder:
        path = Path(folder)
        settings = path / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps({**SETTINGS, **BARE}), encoding="utf-8")
        base = make_base(path, REPOSITORY)
        for kind, name in (*sd35.FILES, *flux.FILES):
            (base / "models" / kind / name).touch()  # a file that is not there would be marked
        options.out.mkdir(parents=True, exist_ok=True)
        with RealServer(base, find_comfyui()) as server:
            shutil.copy(_example(server, base / "output"), base / "input" / "example.png")
            for name in options.names or sorted((path.stem for path in FOLDER.glob("*.json")), reverse=True):
                content = workflow.read(FOLDER / f"{name}.json")
                with open_comfy(server, *window(content)) as page:
                    page.load_workflow(content)
                    if name.startswith("tiny_"):
                        page.queue_and_wait(600)
                    target = options.out / f"{name}.jpg"
                    picture(page, content, path).save(target, quality=QUALITY, optimize=True)
                    print(target, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
