"""The workflows for SD3.5-medium and FLUX.1 in ComfyUI's own front end, with random weights under their names.

The files have the layout of the real ones, with few blocks. The pictures are noise: this is about loading and running.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from harness import flux, sd35, workflow
from harness.browser import ComfyPage
from harness.demo import FOLDER
from harness.locate import ComfyUI
from harness.scratch import make_base
from harness.server import RealServer

pytestmark = [pytest.mark.server, pytest.mark.browser]

ROOT = Path(__file__).resolve().parents[2]
# The larger side of what each saves when every size in it is divided: at full size a CPU takes minutes for most.
DIVIDED = {
    "flux_twice_the_size": (4, 512),
    "sd35_1024": (2, 512),
    "sd35_2048": (4, 512),
    "sd35_2048_fast": (4, 512),
    "sd35_2048_from_1024": (4, 512),
    "sd35_2048_kernel": (4, 512),
    "sd35_4096": (8, 512),
    "sd35_img2img": (1, 300),
    "sd35_inpaint": (1, 300),
    "sd35_twice_the_size": (4, 512),
}
# Where the values of a node hold its width and height.
SIZE_AT = {"DAVAE_Sampler": 9, "DAVAE_EmptyLatent": 0, "EmptySD3LatentImage": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, comfyui: ComfyUI) -> Iterator[RealServer]:
    """A server whose text encoders are short, with all files of the workflows."""
    root = tmp_path_factory.mktemp("sd35")
    short = sd35.with_short_text_encoders(comfyui, root / "comfyui")
    base = make_base(root / "base", ROOT)
    sd35.write_files(base / "models")
    flux.with_one_head(short.root)
    flux.write_files(base / "models")
    Image.radial_gradient("L").resize((300, 200)).convert("RGBA").save(base / "input" / "example.png")
    with RealServer(base, short) as running:
        yield running


def test_there_is_a_test_for_every_workflow() -> None:
    assert {path.stem for path in FOLDER.glob("*.json") if not path.stem.startswith("tiny_")} == set(DIVIDED)


@pytest.mark.parametrize("name", DIVIDED)
def test_the_workflow_loads_runs_and_gives_its_picture(
    server: RealServer, module_page: ComfyPage, name: str, run_workflow, tmp_path: Path
) -> None:
    content, (divisor, size) = workflow.read(FOLDER / f"{name}.json"), DIVIDED[name]
    for node in content["nodes"]:
        if (first := SIZE_AT.get(node["type"])) is not None:
            node["widgets_values"][first : first + 2] = [side // divisor for side in node["widgets_values"][first:][:2]]
    (picture,) = run_workflow(server, module_page, content, tmp_path / f"{name}.png")
    assert max(Image.open(picture).size) == size
