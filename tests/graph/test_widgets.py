"""Every widget of every node at its ends: a result or a message for the person at the graph, never a torch traceback.

What is tried is read from the schemas, so a new widget is covered by itself, and a new node as soon as its sockets are
of a kind known here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from harness.graph import Graph
from harness.result import Result

# A run is cancelled after so many steps: that it works is seen by then, and 10000 of them would take too long.
ENOUGH_STEPS = 15
# Where the default is too large for the toys.
SMALL = {"width": 64, "height": 64, "steps": 2}


class Bench:
    """Runs one node at a time on sockets and files of the toy family."""

    def __init__(self, comfy, toys) -> None:
        self.comfy, self.toys = comfy, toys
        family = toys.family
        self.files = {
            ("DAVAE_Loader", "davae_name"): family.davae_file,
            ("DAVAE_Adapter", "adapter_name"): family.adapter_file,
            ("DAVAE_FewSteps", "lora_name"): family.few_steps_file,
            ("DAVAE_Sampler", "adapter_name"): "(already adapted)",
            ("DAVAE_ModelLoader", "model_name"): family.merged_file,
            ("DAVAE_PredictDetail", "predictor_name"): family.predictor_file,
        }
        self.nodes = {n: node.GET_SCHEMA() for n, node in comfy.nodes.NODE_CLASS_MAPPINGS.items() if n[:6] == "DAVAE_"}
        self.constants = {
            "image": torch.rand(1, 64, 64, 3),
            "latent": {"samples": torch.randn(1, 32, 4, 4)},
            "base": {"samples": torch.randn(1, 16, 4, 4)},
        }

    def socket(self, g: Graph, node: str, name: str, kind: str) -> list:
        """A link for a socket of a node."""
        wants_base = {("DAVAE_FromBaseLatent", "samples"), ("DAVAE_SwapBase", "base_latent")}
        wants_base.add(("DAVAE_PredictDetail", "samples"))
        model = self.toys.model(g)
        made = {
            "MODEL": lambda: model if node == "DAVAE_Adapter" else self.toys.adapter(g, model),
            "DAVAE": lambda: self.toys.davae(g)[2],
            "CONDITIONING": lambda: self.toys.conditioning(g)["positive"],
            "IMAGE": lambda: g.node("HarnessConstant", key="image"),
            "LATENT": lambda: g.node("HarnessConstant", key="base" if (node, name) in wants_base else "latent"),
        }
        return made[kind]()

    def run(self, node: str, widgets: dict[str, object]) -> Result:
        """The node with these widgets, all others at their defaults, and its required sockets connected."""
        g, inputs = Graph(), {}
        for entry in self.nodes[node].inputs or []:
            if is_widget(entry):
                inputs[entry.id] = self.files.get((node, entry.id), SMALL.get(entry.id, entry.default))
            elif not entry.optional:
                inputs[entry.id] = self.socket(g, node, entry.id, entry.io_type)
        tried = g.node(node, **{**inputs, **widgets})
        for i in range(len(self.nodes[node].outputs)):
            g.node("HarnessCapture", value=tried[i], key=f"{i}")
        self.comfy.interrupt_after(ENOUGH_STEPS)
        try:
            return self.comfy.run(g.prompt, inputs=self.constants)
        except AssertionError:
            return self.comfy.run(g.prompt, inputs=self.constants, expect_error=True)

    def complaint(self, node: str, widgets: dict[str, object]) -> str | None:
        """What is wrong with what the user gets, or None."""
        result = self.run(node, widgets)
        if result.error is not None:
            ours = vars(self.comfy.pack("davae_core.errors"))
            clear = result.error.kind == "validation" or result.error.exception_type.rpartition(".")[2] in ours
            return None if clear else f"{node} {widgets}: {result.error}"
        for value in result.captured.values():
            tensor = value.get("samples") if isinstance(value, dict) else value
            if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
                return f"{node} {widgets}: values that are not numbers"
        return None if result.interrupted or result.captured else f"{node} {widgets}: nothing came out"


@pytest.fixture
def bench(comfy, toys) -> Bench:
    return Bench(comfy, toys)


def is_widget(entry) -> bool:
    return hasattr(entry, "default")


def ends(schema) -> Iterator[tuple[str, object, object]]:
    """The number widgets of a node with their least and largest value."""
    for entry in schema.inputs or []:
        if getattr(entry, "max", None) is not None:
            yield entry.id, entry.min, entry.max


def choices(bench: Bench, node: str) -> Iterator[tuple[str, list[str]]]:
    """The drop-down widgets of a node with their options, but not lists of files."""
    for entry in bench.nodes[node].inputs or []:
        if getattr(entry, "options", None) and (node, entry.id) not in bench.files:
            yield entry.id, entry.options


def test_every_number_at_its_least_and_at_its_largest(bench):
    tried, complaints = set(), []
    for node, schema in bench.nodes.items():
        for name, *values in ends(schema):
            for value in values:
                tried.add((node, name, value))
                complaints.append(bench.complaint(node, {name: value}))
    assert {("DAVAE_Sampler", "steps", 10000), ("DAVAE_EmptyLatent", "batch_size", 4096)} <= tried
    assert not any(complaints), "\n\n".join(filter(None, complaints))


def test_all_numbers_of_a_node_at_their_least_and_at_their_largest_together(bench):
    complaints = []
    for node, schema in bench.nodes.items():
        found = list(ends(schema))
        for which in (1, 2):
            complaints.append(bench.complaint(node, {entry[0]: entry[which] for entry in found}))
    assert not any(complaints), "\n\n".join(filter(None, complaints))


def test_every_choice_of_every_drop_down(bench):
    tried, complaints = 0, []
    for node in bench.nodes:
        for name, options in choices(bench, node):
            for option in options:
                tried += 1
                complaints.append(bench.complaint(node, {name: option}))
    assert tried > 40  # samplers, schedulers, dtypes, size rules
    assert not any(complaints), "\n\n".join(filter(None, complaints))


@pytest.mark.parametrize(("node", "name"), [("DAVAE_Sampler", "steps"), ("DAVAE_EmptyLatent", "width")])
@pytest.mark.parametrize("beyond", [-1, 10**9])
def test_numbers_beyond_the_ends_are_refused_before_anything_runs(bench, node, name, beyond):
    error = bench.run(node, {name: beyond}).error
    assert error.kind == "validation" and name in error.exception_message


def test_an_empty_latent_larger_than_the_memory_says_how_large(bench):
    error = bench.run("DAVAE_EmptyLatent", {"width": 16384, "height": 16384, "batch_size": 4096}).error
    assert "[4096, 32, 1024, 1024] takes 512.0 GiB" in error.exception_message and "smaller" in error.exception_message


def test_the_largest_size_gives_a_latent(bench):
    result = bench.run("DAVAE_EmptyLatent", {"width": 16384, "height": 32})
    assert result.captured["0"]["samples"].shape == (1, 32, 2, 1024)


def test_the_most_steps_begin_and_can_be_cancelled(bench):
    result = bench.run("DAVAE_Sampler", {"steps": 10000})
    assert result.interrupted and len(result.previews) == ENOUGH_STEPS
