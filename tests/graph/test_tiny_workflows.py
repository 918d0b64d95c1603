"""The workflows: those of the tiny models run as shipped, and the files of all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from davae_core import checkpoints, tiny
from davae_core.sampling import Sampling
from harness import workflow
from harness.demo import FOLDER, WORKFLOWS
from harness.headless import HeadlessComfy
from harness.result import Result

SAVED = {
    "tiny_davae": ["With DA-VAE"],
    "tiny_256": ["256 px"],  # samples as the one before, whose result is kept
    "tiny_detail_strength": [f"Detail strength {value}" for value in ("0", "0.5", "1", "1.5")],
    "tiny_fast": ["1 step", "2 steps", "4 steps", "8 steps", "30 steps, without the LoRA"],
    "tiny_from_base": ["Twice the size"],
    "tiny_img2img": ["After"],
    "tiny_inpaint": ["After"],
    "tiny_kernel": ["Save Image"],
    "tiny_native": ["Base model alone"],
    "tiny_reroll_detail": ["Before", "Other detail"],
    "tiny_roundtrip": ["Encoded and decoded again", "Its base, half the size"],
    "tiny_swap_base": ["Before", "New base, old detail"],
    "tiny_twice_the_size": ["Predicted detail"],
}
ALL = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def recommended() -> checkpoints.native.Recommended:
    """What the tiny adapter recommends."""
    return checkpoints.load_adapter(tiny.FOLDERS["loras"] / tiny.ADAPTER).config.recommended


@pytest.fixture(scope="module")
def prompts(comfy: HeadlessComfy) -> dict[str, workflow.Prompt]:
    """All workflows as prompts."""
    return {name: workflow.load(FOLDER / f"{name}.json", comfy.nodes) for name in SAVED}


@pytest.fixture(scope="module")
def results(comfy: HeadlessComfy, prompts: dict[str, workflow.Prompt]) -> dict[str, Result]:
    """What came out of each workflow as shipped."""
    return {name: comfy.run(prompt) for name, prompt in prompts.items()}


def files(comfy: HeadlessComfy, prompt: workflow.Prompt, result: Result) -> dict[str, Path]:
    """Saved and previewed pictures by the titles of their nodes."""
    return workflow.pictures(prompt, result.outputs, comfy.base)


def boxes(content: dict) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right, bottom of every node with its title bar, in pixels of the canvas."""
    found = {}
    for node in content["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        found[node["title"]] = (x, y - 30, x + width, y + height)
    return found


def inside(box: tuple[float, ...], outer: tuple[float, ...]) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_every_tiny_workflow_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("tiny_*.json")} == set(SAVED) > set(WORKFLOWS)


@pytest.mark.parametrize("name", SAVED)
def test_every_picture_of_the_workflow_is_saved(comfy, prompts, results, name: str) -> None:
    titles = [node["_meta"]["title"] for node in prompts[name].values() if node["class_type"] == "SaveImage"]
    assert titles == SAVED[name]
    for title, file in files(comfy, prompts[name], results[name]).items():
        assert np.asarray(Image.open(file)).std() > 0, f"{title} is one flat colour"


def test_davae_draws_twice_the_width_and_height_from_the_same_tokens(comfy, prompts, results) -> None:
    native, davae = (
        Image.open(files(comfy, prompts[name], results[name])[SAVED[name][0]]).size
        for name in ("tiny_native", "tiny_davae")
    )
    assert davae == tuple(2 * side for side in native)
    spec = checkpoints.load_adapter(adapter_file(comfy)).config.latent
    assert [side // spec.factor for side in davae] == [side // spec.base_factor for side in native]


def test_twice_the_size_is_the_same_drawing_with_sharper_edges(comfy, prompts, results) -> None:
    found = files(comfy, prompts["tiny_256"], results["tiny_256"])
    drawn = files(comfy, prompts["tiny_davae"], results["tiny_davae"])["With DA-VAE"]
    small, large = (Image.open(found[title]).convert("RGB") for title in ("128 px", "256 px"))
    assert np.array_equal(np.asarray(small), np.asarray(Image.open(drawn).convert("RGB")))
    assert large.size == tuple(2 * side for side in small.size)
    again = large.resize(small.size, Image.Resampling.BOX)
    a, b = (np.asarray(picture, dtype=np.float64) for picture in (small, again))
    assert 10 * np.log10(255**2 / ((a - b) ** 2).mean()) > 24
    enlarged = small.resize(large.size, Image.Resampling.BICUBIC)
    steepest = [np.abs(np.diff(np.asarray(p, dtype=np.float64), axis=1)).max(axis=2) for p in (large, enlarged)]
    assert np.quantile(steepest[0], 0.99) > 1.2 * np.quantile(steepest[1], 0.99)


def adapter_file(comfy: HeadlessComfy) -> Path:
    import folder_paths

    return Path(folder_paths.get_full_path("loras", tiny.ADAPTER))


def test_the_round_trip_starts_from_the_picture_that_davae_draws(comfy, prompts, results) -> None:
    drawn = files(comfy, prompts["tiny_davae"], results["tiny_davae"])["With DA-VAE"]
    again = files(comfy, prompts["tiny_roundtrip"], results["tiny_roundtrip"])
    assert np.array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(again["Before"])))
    sizes = {title: Image.open(file).size for title, file in again.items()}
    assert sizes["Encoded and decoded again"] == sizes["Before"]
    assert tuple(2 * side for side in sizes["Its base, half the size"]) == sizes["Before"]


def test_the_round_trip_gives_the_picture_back(comfy, prompts, results) -> None:
    found = files(comfy, prompts["tiny_roundtrip"], results["tiny_roundtrip"])
    before, after = (
        np.asarray(Image.open(found[title]).convert("RGB"), dtype=np.float64)
        for title in ("Before", "Encoded and decoded again")
    )
    assert 10 * np.log10(255**2 / ((before - after) ** 2).mean()) > 20


@pytest.mark.parametrize("name", ["tiny_native", "tiny_davae"])
def test_the_last_preview_has_the_colours_of_the_picture(comfy, prompts, results, name: str) -> None:
    picture = Image.open(files(comfy, prompts[name], results[name])[SAVED[name][0]]).convert("RGB")
    preview = results[name].previews[-1].convert("RGB")
    small = picture.resize(preview.size, Image.Resampling.BOX)
    difference = np.asarray(small, dtype=np.float64) - np.asarray(preview, dtype=np.float64)
    assert np.abs(difference).mean() < 25  # of 255


def test_the_base_model_is_sampled_as_the_adapter_recommends_at_its_own_guidance(comfy, prompts, recommended) -> None:
    native = prompts["tiny_native"]
    sampler = native[workflow.find(native, "KSampler")]["inputs"]
    shift = native[workflow.find(native, "ModelSamplingSD3")]["inputs"]["shift"]
    assert (sampler["steps"], sampler["cfg"], shift) == (recommended.steps, Sampling().cfg, recommended.shift)


def test_the_size_is_the_one_the_adapter_was_trained_for(comfy, prompts, recommended) -> None:
    """When other tiny models take the place of these, change width and height in the files."""
    for name, prompt in prompts.items():
        for node in prompt.values():
            if node["class_type"] in ("DAVAE_Sampler", "DAVAE_EmptyLatent"):
                assert {node["inputs"]["width"], node["inputs"]["height"]} == {recommended.size}, name


def test_the_files_that_are_asked_for_are_those_of_the_tiny_family(prompts) -> None:
    for name, prompt in prompts.items():
        values = [value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, str)]
        asked = {value for value in values if value.endswith(".safetensors")}
        assert (
            asked <= {tiny.AUTOENCODER, tiny.ADAPTER, tiny.FEW_STEPS, tiny.PREDICTOR} and tiny.AUTOENCODER in asked
        ), name


@pytest.mark.parametrize("name", ALL)
def test_the_graph_is_laid_out_for_a_reader(name: str) -> None:
    content = workflow.read(FOLDER / f"{name}.json")
    found = boxes(content)
    assert len(found) == len(content["nodes"]), "two nodes have one title"
    for title, box in found.items():
        for other, second in found.items():
            assert title == other or apart(box, second), f"{title} and {other} overlap"
    groups = {
        g["title"]: (*g["bounding"][:2], *np.add(g["bounding"][:2], g["bounding"][2:])) for g in content["groups"]
    }
    notes = {node["title"] for node in content["nodes"] if node["type"] in workflow.NOTES}
    assert notes, "no note says what the graph does"
    for title, box in found.items():
        homes = [group for group, outer in groups.items() if inside(box, outer)]
        assert len(homes) == (title not in notes), f"{title} is in the groups {homes}"
    links = {link[0]: link for link in content["links"]}
    nodes = {node["id"]: node for node in content["nodes"]}
    for _, origin, _, target, *_ in links.values():
        assert nodes[origin]["pos"][0] <= nodes[target]["pos"][0], "a link runs from right to left"


@pytest.mark.parametrize("name", ALL)
def test_the_file_says_nothing_of_the_machine_it_was_made_on(name: str) -> None:
    content = workflow.read(FOLDER / f"{name}.json")
    assert "/" not in json.dumps(
        [node.get("widgets_values") for node in content["nodes"] if "Note" not in node["type"]]
    )
    assert content["version"] == 0.4


# The first file of each kind of loader that a user has to bring, and where the file belongs.
LOADERS = {"CheckpointLoaderSimple": "checkpoints", "TripleCLIPLoader": "text_encoders"}


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("tiny_")])
def test_files_to_download_are_named_with_their_folder_and_address(name: str) -> None:
    content = workflow.read(FOLDER / f"{name}.json")
    loaders = [node for node in content["nodes"] if node["type"] in LOADERS]
    assert {node["type"] for node in loaders} == set(LOADERS) - ({"TripleCLIPLoader"} if "flux" in name else set())
    for node in loaders:
        told = {model["name"]: model for model in node["properties"]["models"]}
        assert list(told) == node["widgets_values"]
        for file, model in told.items():
            assert model["directory"] == LOADERS[node["type"]]
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(file)
    (note,) = [node for node in content["nodes"] if node["type"] == "MarkdownNote"]
    asked = [value for node in content["nodes"] for value in node.get("widgets_values") or [] if isinstance(value, str)]
    for file in {value for value in asked if value.endswith(".safetensors")}:
        assert file.removesuffix(".safetensors") in note["widgets_values"][0], f"{file} is not in the note"


@pytest.mark.parametrize("name", ALL)
def test_a_picture_of_the_workflow_is_beside_it(name: str) -> None:
    """Made by ``python -m harness.thumbnails``."""
    picture = Image.open(FOLDER / f"{name}.jpg")
    assert picture.format == "JPEG" and picture.width >= 800


def test_the_few_step_workflow_draws_one_seed_in_the_steps_of_its_titles(prompts, recommended) -> None:
    samplers = {
        node["_meta"]["title"]: node["inputs"]
        for node in prompts["tiny_fast"].values()
        if node["class_type"] == "DAVAE_Sampler"
    }
    assert {title: f"Sampler ({asked['steps']})" for title, asked in samplers.items()} == {t: t for t in samplers}
    assert len({(asked["seed"], asked["cfg"], asked["shift"]) for asked in samplers.values()}) == 1
    assert samplers["Sampler (30)"]["steps"] == recommended.steps


def test_the_note_of_the_base_model_says_the_settings_that_it_has(prompts, recommended) -> None:
    content = json.loads((FOLDER / "tiny_native.json").read_text())
    note = next(node["widgets_values"][0] for node in content["nodes"] if node["type"] == "MarkdownNote")
    of = {node["class_type"]: node["inputs"] for node in prompts["tiny_native"].values()}
    assert of["KSampler"]["cfg"] == recommended.cfg and f"cfg ({recommended.cfg:g})" in note
    assert (of["ModelSamplingSD3"]["shift"], of["KSampler"]["steps"]) == (recommended.shift, recommended.steps)
