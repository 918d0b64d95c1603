"""How the tests are run: which ones, in which order and worker, in which precision. A plugin of pytest.

    pytest                      everything but what is marked `slow`
    pytest --all                everything
    pytest --precision bf16     what trains with `precision auto` computes in bf16, as on a CPU with AMX

A test is also run where its name or a `-m` asks for it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from . import precision

# Files that share what takes seconds to make (trained toys, a server, a ComfyUI in the process), so that one worker
# makes it. The longest first: no worker has one left when the others are done.
SHARED = {
    "training": ("tests/unit/training/",),
    "server": (
        "tests/server/test_workflows.py",
        "tests/server/test_languages.py",
        "tests/server/test_pack.py",
        "tests/harness/test_server.py",
    ),
    "sd35": ("tests/server/test_sd35_workflows.py",),
    "comfy": ("tests/graph/", "tests/harness/test_headless.py", "tests/harness/test_workflow.py"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options above."""
    group = parser.getgroup("davae")
    group.addoption("--all", action="store_true", help="also run the tests marked slow")
    group.addoption(
        "--precision",
        choices=("bf16", "fp32"),
        default=os.environ.get(precision.VARIABLE),
        help=f"what `precision auto` means on this CPU (default: {precision.VARIABLE}, else what the CPU can)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes this process and those that tests start compute in the precision asked for."""
    if chosen := config.getoption("--precision"):
        os.environ[precision.VARIABLE] = chosen
        precision.force()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is slow, and sorts the rest by what it shares."""
    chosen = config.getoption("--all") or config.getoption("-m") or any("::" in argument for argument in config.args)
    if not chosen:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    order = [*SHARED]
    items.sort(key=lambda item: order.index(group) if (group := shared(item.nodeid)) in SHARED else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps together in a worker what shares something; the marks of `--dist loadgroup` do nothing in pytest 9.2."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shared(nodeid)

    return Together(config, log)


def shared(nodeid: str) -> str:
    """The name of the tests that stay together with this one: a key of SHARED, or its file."""
    file = nodeid.partition("::")[0]
    return next((name for name, starts in SHARED.items() if file.startswith(starts)), file)
