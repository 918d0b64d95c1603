"""The registry's package alone on ComfyUI's own server: everything that nodes need is in it, and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from harness import release, workflow
from harness.locate import REPOSITORY, ComfyUI
from harness.scratch import make_base
from harness.server import RealServer

pytestmark = pytest.mark.server


@dataclass
class Installed:
    """A server that has the package and nothing else.

    Attributes:
        server: the running server.
        folder: where the package is.
        packages: the Python packages of the environment before the server was started.
    """

    server: RealServer
    folder: Path
    packages: dict[str, str]

    @property
    def nodes(self) -> set[str]:
        """The ids of the pack's nodes that ComfyUI registered."""
        return {name for name in self.server.object_info() if name.startswith("DAVAE_")}


def python_packages() -> dict[str, str]:
    """What ``pip list`` shows."""
    return {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, comfyui: ComfyUI) -> Iterator[Installed]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the package is not known")
    before = python_packages()
    base = make_base(tmp_path_factory.mktemp("release"), None, probe=False)
    package = release.pack(REPOSITORY, base / "node.zip")
    folder = release.install(package, base / "custom_nodes" / release.install_name(REPOSITORY))
    with RealServer(base, comfyui) as server:
        yield Installed(server, folder, before)


def test_the_package_holds_what_nodes_need_and_nothing_else(installed: Installed) -> None:
    top = {path.name for path in installed.folder.iterdir() if path.name != "__pycache__"}
    assert top == {
        "CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "__init__.py", "davae_core", "locales", "nodes",
        "pyproject.toml", "requirements.txt", "workflows",
    }  # fmt: skip
    assert not {"training", "evaluation"} & {path.name for path in (installed.folder / "davae_core").iterdir()}
    for name in release.files(REPOSITORY):
        assert (installed.folder / name).read_bytes() == (REPOSITORY / name).read_bytes(), name


def test_the_nodes_are_registered(installed: Installed) -> None:
    pages = {page.stem for page in (REPOSITORY / "nodes" / "web" / "docs").glob("*.md")}
    assert installed.nodes == pages != set()
    lines = [line for line in installed.server.log().splitlines() if installed.folder.name in line]
    assert lines and not [line for line in lines if "IMPORT FAILED" in line or "Cannot import" in line]
    modules = {info["python_module"] for name, info in installed.server.object_info().items() if name in pages}
    assert modules == {"custom_nodes.comfyui-davae"}


def test_help_pages_translations_and_templates_are_served(installed: Installed) -> None:
    server, name = installed.server, installed.folder.name
    for node in installed.nodes:
        assert server.get(f"/extensions/{name}/docs/{node}.md").startswith(b"# "), node
    translations = server.get_json("/i18n")
    assert {language: set(texts["nodeDefs"]) for language, texts in translations.items()} == {
        language: installed.nodes for language in ("en", "ja", "zh")
    }
    workflows = sorted((REPOSITORY / "workflows").iterdir())
    assert set(server.get_json("/workflow_templates")[name]) == {path.stem for path in workflows}
    for path in workflows:
        assert server.get(f"/api/workflow_templates/{name}/{path.name}") == path.read_bytes(), path.name


def test_a_shipped_workflow_runs(installed: Installed) -> None:
    server = installed.server
    path = installed.folder / "workflows" / "tiny_davae.json"
    prompt = workflow.to_prompt(json.loads(path.read_text(encoding="utf-8")), server.object_info())
    result = server.queue(workflow.with_values(prompt, "Prompt", text="flat rocket"))
    assert result.images and all(Image.open(file).size for file in result.images)


def test_the_python_environment_is_left_as_it_was(installed: Installed) -> None:
    """What the registry's client installs is what these two files ask for: nothing."""
    assert python_packages() == installed.packages
    lines = (installed.folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.strip() and not line.startswith("#")]
    assert "\ndependencies = []\n" in (installed.folder / "pyproject.toml").read_text(encoding="utf-8")
    assert not [script for script in ("install.py", "prestartup_script.py") if (installed.folder / script).exists()]
