"""How the tests are run: which ones, in which order and worker, in which precision. A plugin of pytest.

    pytest                      everything but what is marked `slow`
    pytest --all                everything
    pytest --precision bf16     what trains with `precision auto` computes in bf16, as on a CPU with AMX

A test is also run where its name or a `-m` asks for it.
"""

from __future__ import annotations

import os

import pytest

# Fixtures that take seconds to make, and are made once in each worker that needs them: the tests of one stay together.
# The longest first, so that no worker has it left at the end.
SHARED = ("stages", "server", "comfy")
PRECISION = "DAVAE_TEST_PRECISION"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options above."""
    group = parser.getgroup("davae")
    group.addoption("--all", action="store_true", help="also run the tests marked slow")
    group.addoption(
        "--precision",
        choices=("bf16", "fp32"),
        default=os.environ.get(PRECISION),
        help=f"what `precision auto` of a training means on this CPU (default: {PRECISION}, else as the CPU is)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes this process and those that tests start compute in the precision asked for."""
    if precision := config.getoption("--precision"):
        os.environ[PRECISION] = precision
        force_precision()


def force_precision() -> None:
    """Makes torch take this CPU for one with AMX, or without, where DAVAE_TEST_PRECISION says so."""
    if precision := os.environ.get(PRECISION):
        import torch

        torch.cpu._is_amx_tile_supported = lambda: precision == "bf16"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is slow, and sorts the rest by what it shares."""
    chosen = config.getoption("--all") or config.getoption("-m") or any("::" in argument for argument in config.args)
    if not chosen:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    for item in items:
        item.add_marker(pytest.mark.xdist_group(shared(item)))
    items.sort(key=lambda item: rank(shared(item)))


def rank(group: str) -> int:
    """The place of a group in the order of the run."""
    return SHARED.index(group) if group in SHARED else len(SHARED)


def shared(item: pytest.Item) -> str:
    """The name of the tests that stay together with this one: of a shared fixture, or of a file."""
    definitions = getattr(item, "_fixtureinfo", None)
    found = definitions.name2fixturedefs if definitions else {}
    session = {name for name in SHARED if name in found and found[name][-1].scope == "session"}
    return next((name for name in SHARED if name in session), item.nodeid.partition("::")[0])
