"""Recipes: how they are flattened, compared and read from a command line."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

from davae_core.errors import DAVAEError
from davae_core.training.data.dataset import DataConfig
from davae_core.training.recipes import tiny as recipes
from davae_core.training.run import config
from davae_core.training.run.config import OptimiserConfig, RunConfig
from davae_core.training.stages import STAGES

ALL = [
    recipe
    for family in (recipes.BASE_AUTOENCODER, recipes.BASE_DIT, recipes.AUTOENCODER, recipes.ADAPTER)
    for _, recipe in family.values()
]


@dataclass(frozen=True)
class Recipe:
    """A recipe."""

    data: DataConfig = DataConfig(("here",), size=64)
    run: RunConfig = RunConfig()
    optimiser: OptimiserConfig = OptimiserConfig()


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: f"{type(recipe).__name__}-{recipe.data.size}")
def test_a_flat_recipe_survives_json(recipe: object) -> None:
    flat = config.flat(recipe)
    assert json.loads(json.dumps(flat)) == flat
    assert config.differences(json.loads(json.dumps(flat)), flat) == {}
    assert {"run.steps", "data.images", "optimiser.lr"} < set(flat)


def test_what_may_differ_is_part_of_the_recipes() -> None:
    # A misspelt name would do nothing.
    assert set().union(*map(config.flat, ALL)) >= config.FREE
    assert all(set(config.flat(recipe)) >= {name for name in config.FREE if "." in name} for recipe in ALL)


def test_every_setting_that_is_a_path_is_known_to_be_one() -> None:
    """Files tell the settings they were made with, and nobody's folders."""
    for stage in STAGES.values():
        for _, recipe in stage.recipes.values():
            for name, field in paths_of(recipe):
                assert name in config.PLACES | config.ENTRIES, f"{name}: {field}"


def paths_of(recipe: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(type(recipe))
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            yield from paths_of(value, f"{prefix}{field.name}.")
        elif "Path" in str(hints[field.name]):
            yield f"{prefix}{field.name}", value


@pytest.mark.parametrize(
    ("before", "name"), [("/home/a b/vae.sft", "vae.sft"), ("C:\\x y\\vae.sft", "vae.sft"), (None, None)]
)
def test_a_file_does_not_tell_where_others_lay(before: str | None, name: str | None) -> None:
    images = str(("/home/a b/photos::repeats=2::prefix=a photo, 50/50", "cats", "D:\\me\\dogs"))
    told = config.without_folders({"base": before, "data.images": images, "data.held_out": "('2%',)", "rank": 4})
    assert told["base"] == name and told["rank"] == 4 and told["data.held_out"] == "('2%',)"
    assert told["data.images"] == str(("photos::repeats=2::prefix=a photo, 50/50", "cats", "dogs"))


def test_differences_are_named_with_both_values() -> None:
    old = config.flat(Recipe())
    new = config.flat(Recipe(run=RunConfig(seed=3, out=Path("elsewhere"), resume=True)))
    assert config.differences(old, new) == {"run.seed": "run.seed: was 0, is 3"}
    assert config.differences(old, old) == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["a"], ["b"]),
        (["a::repeats=2"], ["/x/b::repeats = 2"]),
        (["a", "b"], ["all"]),
        (["a", "b::size=8"], ["c", "d::size=8"]),
        (["gone::here"], ["b"]),
    ],
    ids=["moved", "moved with its settings", "named as one", "both moved", "colons in its name"],
)
def test_images_may_lie_elsewhere(old: list[str], new: list[str]) -> None:
    assert config.differences(images(*old), images(*new)) == {}


@pytest.mark.parametrize("setting", ["prefix=a", "suffix=a", "repeats=4", "size=8"])
def test_what_is_said_of_images_is_a_setting(setting: str) -> None:
    for old, new in (([f"a::{setting}"], ["a"]), (["a", "b"], ["a", f"b::{setting}"])):
        for was, now in ((old, new), (new, old)):
            line = f"data.images: was {tuple(was)}, is {tuple(now)}"
            assert config.differences(images(*was), images(*now)) == {"data.images": line}


def images(*entries: str) -> dict[str, Any]:
    return config.flat(Recipe(data=DataConfig(entries)))


def test_steps_are_free_but_where_a_cosine_ends_with_them() -> None:
    def steps(count: int, schedule: Literal["constant", "cosine"]) -> dict[str, Any]:
        return config.flat(Recipe(run=RunConfig(steps=count), optimiser=OptimiserConfig(schedule=schedule)))

    assert config.differences(steps(4, "constant"), steps(8, "constant")) == {}
    assert config.differences(steps(4, "cosine"), steps(4, "cosine")) == {}
    assert config.differences(steps(4, "constant"), steps(8, "cosine")).keys() == {"optimiser.schedule"}
    (line,) = config.differences(steps(4, "cosine"), steps(8, "cosine")).values()
    assert line.startswith("run.steps: was 4, is 8, which changes the learning rate of every step")


def test_a_field_that_is_new_or_gone_is_a_difference() -> None:
    old = config.flat(Recipe())
    assert config.differences(old, old | {"run.new": 1}) == {"run.new": "run.new: was None, is 1"}
    assert config.differences(old | {"run.gone": 1}, old) == {"run.gone": "run.gone: was 1, is None"}


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"micro_batch": -1}, {"log_every": 0}, {"bad_steps": 0}])
def test_a_run_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DAVAEError, match="at least 1"):
        RunConfig(**wrong)  # type: ignore[arg-type]


def test_the_command_line_changes_the_fields_of_a_named_recipe() -> None:
    known = {"one": ("the first", Recipe()), "two": ("the second", replace(Recipe(), run=RunConfig(steps=7)))}
    args = ["two", "--run.batch", "5", "--optimiser.betas", "0.1", "0.2", "--data.images", "a", "b", "--run.resume"]
    recipe = config.from_command_line(known, "A test.", args)
    assert recipe.run == RunConfig(steps=7, batch=5, resume=True)
    assert recipe.optimiser.betas == (0.1, 0.2)
    assert recipe.data == DataConfig(("a", "b"), size=64)


def test_both_sizes_are_one_recipe() -> None:
    for family in (recipes.BASE_AUTOENCODER, recipes.BASE_DIT, recipes.AUTOENCODER, recipes.ADAPTER):
        micro, tiny = (config.flat(family[size][1]) for size in ("micro", "tiny"))
        differ = {name for name in micro if micro[name] != tiny[name] and "micro" not in str(micro[name])}
        assert "data.size" in differ
        assert tiny["data.size"] == 2 * micro["data.size"]
        assert not {name for name in differ if name.startswith("model.")}
