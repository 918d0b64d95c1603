"""What the seam relies on in ComfyUI is there: read from the seam's source, looked up in the running ComfyUI.

A name that is looked up with ``hasattr`` or ``getattr`` in the source is optional, and so is an attribute that is only
set. Objects are known by their annotation, by an assignment, or by the table OBJECTS.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

SEAM = Path(__file__).resolve().parents[2] / "nodes" / "comfy_bridge"
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "latent_preview", "nodes"}

# Live objects: MODEL is a stock MODEL, so MODEL.model is its inner model.
MODEL, INNER, CONFIG = "MODEL", "MODEL.model", "MODEL.model.model_config"
ANNOTATIONS = {"comfy.model_patcher.ModelPatcher": MODEL, "comfy.model_base.BaseModel": INNER}
OBJECTS = {
    "autoencoder.py": {"self.patcher": MODEL},
    "carried.py": {"self.base": MODEL, "self.patcher": MODEL, "source": MODEL, "patcher": MODEL},
    "model.py": {"self.diffusion_model": f"{INNER}.diffusion_model"},
    "merged.py": {"config": CONFIG, "model": INNER},
    "rebuild.py": {"self.base": MODEL, "patcher": MODEL, "model": INNER, "config": CONFIG},
    "versions.py": {"loaded": "comfy.model_management.LoadedModel"},
}
# What ComfyUI's own code calls on the objects that the seam makes or changes.
CALLED_BY_COMFYUI = (
    "comfy.sd.CLIP.encode_from_tokens_scheduled",
    "comfy.sd.CLIP.load_model",
    "comfy.sd.CLIP.tokenize",
    "comfy.sd.VAE.decode_tiled_",
    "comfy.sd.VAE.encode_tiled_",
    "comfy.sd.VAE.throw_exception_if_invalid",
)


class Uses(ast.NodeVisitor):
    """What one file uses of ComfyUI.

    Attributes:
        names: dotted paths, for example ``comfy.sd.VAE`` or ``MODEL.clone``; ``()`` stands for an instance.
        keywords: (path of a function, name of a keyword it is called with).
        objects: the rows of OBJECTS that were met.
    """

    def __init__(self, source: str, objects: dict[str, str]) -> None:
        self.names: set[str] = set()
        self.keywords: set[tuple[str, str]] = set()
        self.objects: set[str] = set()
        self._table = objects
        self._optional: set[str] = set()
        self._scope: dict[str, str] = {}  # local names, as paths
        self._base: str | None = None  # of the class that is being read
        self.visit(ast.parse(source))
        self.names -= self._optional

    def path(self, node: ast.expr) -> str | None:
        """The path an expression stands for, or None where it is not ComfyUI's."""
        text = ast.unparse(node)
        if text in self._table:
            self.objects.add(text)
            return self._table[text]
        if isinstance(node, ast.Name):
            return f"{self._base}()" if node.id == "self" and self._base else self._scope.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.path(node.value)
            return owner and f"{owner}.{node.attr}"
        if text == "super()":
            return self._base
        made = isinstance(node, ast.Call) and not node.args and not node.keywords and self.path(node.func)
        return f"{made}()" if made else None

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            root = alias.name.split(".")[0]
            if root in COMFYUI:
                self.names.add(alias.name)
                self._scope[alias.asname or root] = alias.name if alias.asname else root

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not node.level and node.module and node.module.split(".")[0] in COMFYUI:
            for alias in node.names:
                self._scope[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self.names.add(f"{node.module}.{alias.name}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._base = self._base, next(filter(None, map(self.path, node.bases)), None)
        if self._base:  # a method that takes the place of one that ComfyUI calls
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            self.names |= {f"{self._base}.{name}" for name in methods if not name.startswith("__")}
        self.generic_visit(node)
        self._base = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._scope = self._scope, dict(self._scope)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            known = argument.annotation and ANNOTATIONS.get(self.path(argument.annotation) or "")
            if known:
                self._scope[argument.arg] = known
        self.generic_visit(node)
        self._scope = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        path = self.path(node.value)
        if path and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self._scope[node.targets[0].id] = path
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self.path(node)
        if path is None:
            self.generic_visit(node)
        elif "." in path and isinstance(node.ctx, ast.Load) and not node.attr.startswith("davae_"):
            self.names.add(path)

    def visit_Call(self, node: ast.Call) -> None:
        path, asks = self.path(node.func), ast.unparse(node.func) in ("hasattr", "getattr")
        if path:
            self.keywords |= {(path, keyword.arg) for keyword in node.keywords if keyword.arg}
        if asks and isinstance(node.args[1], ast.Constant):
            self._optional.add(f"{self.path(node.args[0])}.{node.args[1].value}")
        self.generic_visit(node)


FOUND = {file.name: Uses(file.read_text("utf-8"), OBJECTS.get(file.name, {})) for file in sorted(SEAM.glob("*.py"))}
NAMES = [(file, name) for file, uses in FOUND.items() for name in sorted(uses.names)]
KEYWORDS = [(file, *call) for file, uses in FOUND.items() for call in sorted(uses.keywords)]


@pytest.fixture(scope="module")
def model(comfy, toys) -> Any:
    """A MODEL of ComfyUI's own loader."""
    from harness.graph import Graph

    g = Graph()
    g.node("HarnessCapture", value=toys.model(g), key="model")
    return comfy.run(g.prompt).captured["model"]


def look_up(path: str, model: Any) -> Any:
    """The object behind a path; an AssertionError that names the first part of it that is not there.

    ``dir`` and not ``hasattr``, because ComfyUI's model configs answer to any name.
    """
    parts = path.split(".")
    found: Any = model if parts[0] == MODEL else importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        name = part.removesuffix("()")
        if name not in dir(found):
            module = ".".join(parts[:i])
            package = hasattr(found, "__path__")  # one whose module may not be imported yet
            assert package and importlib.util.find_spec(module), f"{'.'.join(parts[: i - 1])} has no {name}"
            found = importlib.import_module(module)
        else:
            found = getattr(found, name)
        found = found() if part.endswith("()") else found
    return found


@pytest.mark.parametrize(("file", "name"), NAMES, ids=lambda value: value)
def test_comfyui_has_what_the_seam_uses(comfy, model, file: str, name: str) -> None:
    try:
        look_up(name, model)
    except (AssertionError, ImportError) as problem:
        pytest.fail(f"comfy_bridge/{file} uses {name}; in ComfyUI {comfy.comfyui.version} {problem}")


@pytest.mark.parametrize(("file", "name", "keyword"), KEYWORDS, ids=lambda value: value)
def test_comfyui_takes_the_keywords_that_the_seam_gives(comfy, model, file: str, name: str, keyword: str) -> None:
    parameters = inspect.signature(look_up(name, model)).parameters.values()
    takes = {entry.name for entry in parameters} | {keyword for entry in parameters if entry.kind == entry.VAR_KEYWORD}
    assert keyword in takes, (
        f"comfy_bridge/{file} calls {name} with {keyword}=, ComfyUI {comfy.comfyui.version} takes {takes}"
    )


@pytest.mark.parametrize("name", CALLED_BY_COMFYUI)
def test_comfyui_still_has_what_it_calls_on_our_objects(comfy, model, name: str) -> None:
    look_up(name, model)


def test_the_seam_imports_nothing_else() -> None:
    known = COMFYUI | {"torch"} | set(sys.stdlib_module_names)
    for file in SEAM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported = [node.module or ""]
            assert {name.split(".")[0] for name in imported} <= known, f"{file.name} imports {imported}"


def test_the_table_of_objects_is_not_stale() -> None:
    for file, objects in OBJECTS.items():
        assert FOUND[file].objects == set(objects), file
    assert len(NAMES) > 80 and len(KEYWORDS) > 10


def test_the_reader_sees_every_kind_of_use() -> None:
    source = """
import comfy.a, nodes as theirs
from comfy.b import B
from ...davae_core import c
short = comfy.a
def f(patcher: B, x):
    thing.known = x.ignored
    if hasattr(short, "new"):
        return short.new(thing.one.two)
    return getattr(short, "newer", None) or theirs.call(1, key=2).rest or theirs.Made().method()
class C(comfy.a.Base):
    def replaced(self):
        return super().above() + self.set_in_init + c.ours
"""
    uses = Uses(source, {"thing": "MODEL"})
    assert uses.names == {
        "comfy.a", "nodes", "comfy.b.B", "MODEL.one.two", "nodes.call", "comfy.a.Base", "comfy.a.Base.replaced",
        "comfy.a.Base.above", "comfy.a.Base().set_in_init", "nodes.Made().method",
    }  # fmt: skip
    assert uses.keywords == {("nodes.call", "key")} and uses.objects == {"thing"}
