"""What modules may import: davae_core torch, and not ComfyUI, not pickle; nodes nothing that the package leaves out."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import release

COMFY = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server"}
REPOSITORY = {"harness", "tests", "dev", "custom_nodes"}
PICKLE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# A published metric, and the authors' release: both come pickled and not otherwise.
READS_WEIGHTS = {"davae_core.perceptual", "davae_core.checkpoints.pickled"}


def loads_weights_only(call: ast.Call) -> bool:
    """Whether a call is ``torch.load(..., weights_only=True)``, said in so many words."""
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return ast.unparse(call.func) == "torch.load" and said.get("weights_only") == "True"


@pytest.fixture(scope="module")
def sources(root: Path) -> dict[str, ast.Module]:
    """The syntax tree of every module of davae_core, by dotted name."""
    found = {}
    for path in sorted((root / "davae_core").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(module: str, tree: ast.Module) -> Iterator[str]:
    """The dotted name of everything a module imports, wherever in it, relative imports resolved."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?"


def test_the_walk_sees_every_way_to_import() -> None:
    source = "import a.b as c\nfrom d import e\ndef f():\n    from . import g\n    from ..h import i\n__import__('j')"
    assert sorted(imports("p.q.r", ast.parse(source))) == ["a.b", "d.e", "j", "p.h.i", "p.q.g"]


def test_the_core_knows_nothing_of_comfyui(sources: dict[str, ast.Module]) -> None:
    assert len(sources) > 10
    for module, tree in sources.items():
        for name in imports(module, tree):
            assert name.split(".")[0] not in COMFY | REPOSITORY | {"?"}, f"{module} imports {name}"


def test_nothing_but_training_imports_training(sources: dict[str, ast.Module]) -> None:
    for module, tree in sources.items():
        if not module.startswith("davae_core.training"):
            for name in imports(module, tree):
                assert not name.startswith("davae_core.training"), f"{module} imports {name}"


FLOORS = ("recipes", "tasks", "objective pretrained places", "run", "text", "data", "")  # of training, from the top


def floor(module: str) -> int:
    """Where a module of davae_core stands: modules import from their own floor and those below."""
    if not module.startswith("davae_core.training."):
        return len(FLOORS) - 1
    room = module.split(".")[2]
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms.split()), -1)  # entry points stand above all


def test_training_imports_downwards_alone(sources: dict[str, ast.Module]) -> None:
    modules = [name for name in sources if name.startswith("davae_core.training.")]
    assert len(modules) > 40 and {floor(name) for name in modules} == set(range(-1, len(FLOORS) - 1))
    for module in modules:
        for name in imports(module, sources[module]):
            if name.startswith("davae_core."):
                assert floor(name) >= floor(module), f"{module} imports {name}"


def test_no_task_imports_another_and_only_entry_points_import_recipes(sources: dict[str, ast.Module]) -> None:
    stages = {"autoencoder", "adapter", "base_autoencoder", "base_dit"}
    for module, tree in sources.items():
        parts = module.split(".")
        for name in imports(module, tree):
            if parts[1:3] == ["training", "tasks"] and name.startswith("davae_core.training.tasks."):
                assert name.split(".")[3] not in stages - {parts[3]}, f"{module} imports {name}"
            if name.startswith("davae_core.training.recipes") and parts[2:3] != ["recipes"]:
                assert module == "davae_core.training.stages", f"{module} imports {name}"


def test_no_circle_of_imports(sources: dict[str, ast.Module]) -> None:
    known = {name.removesuffix(".__init__") for name in sources}
    graph: dict[str, set[str]] = {}
    for module, tree in sources.items():
        found = {name if name in known else name.rpartition(".")[0] for name in imports(module, tree)}
        graph[module.removesuffix(".__init__")] = found & known - {module.removesuffix(".__init__")}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, f"circles among {sorted(graph)}"


def test_no_file_of_the_core_is_longer_than_350_lines(root: Path) -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in (root / "davae_core").rglob("*.py")}
    assert not {str(path.relative_to(root)): length for path, length in lengths.items() if length > 350}


def test_nothing_in_the_registrys_package_imports_what_is_left_out_of_it(root: Path) -> None:
    """Nodes import no training, among others: it is not there."""
    paths = release.left_out(root)
    out = {"pack." + path.removesuffix(".py").strip("/").replace("/", ".") for path in paths}
    modules = [name for name in release.files(root) if name.endswith(".py")]
    assert len(modules) > 20 and {"pack.davae_core.training", "pack.davae_core.evaluation", "pack.harness"} <= out
    for module in modules:
        dotted = ".".join(["pack", *Path(module).with_suffix("").parts])
        for name in imports(dotted, ast.parse((root / module).read_text(encoding="utf-8"))):
            assert not any(f"{name}.".startswith(f"{left}.") for left in out), f"{module} imports {name}"
            assert name.split(".")[0] not in REPOSITORY | {"davae_core"}, f"{module} imports {name}, not relatively"


def test_nothing_reads_pickles(sources: dict[str, ast.Module]) -> None:
    for module, tree in sources.items():
        for name in imports(module, tree):
            assert name.split(".")[0] not in PICKLE, f"{module} imports {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
                assert module in READS_WEIGHTS and loads_weights_only(node), (
                    f"{module}, line {node.lineno}: {ast.unparse(node.func)}"
                )


def test_one_reader_reads_all_json_of_others(sources: dict[str, ast.Module]) -> None:
    """So that a limit is one everywhere. ``metadata`` reads what it has just written, ``data`` files of known hash."""
    own = {"davae_core.checkpoints.foreign_json", "davae_core.checkpoints.metadata", "davae_core.training.tiny.data"}
    for module, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads"):
                assert module in own, f"{module}, line {node.lineno}: {ast.unparse(node)}"


def test_only_a_literal_weights_only_load_is_let_through() -> None:
    allowed = {"torch.load(p, weights_only=True)": True, "torch.load(p, weights_only=safe)": False}
    allowed |= {"torch.load(p)": False, "torch.load(p, **options)": False, "torch.load(p, weights_only=False)": False}
    allowed |= {"torch.save(x, p, weights_only=True)": False}
    for source, expected in allowed.items():
        call = ast.parse(source, mode="eval").body
        assert isinstance(call, ast.Call) and loads_weights_only(call) is expected, source


@pytest.mark.parametrize("module", ["autoencoder", "mmdit", "flow", "alignment", "latent"])
def test_the_mathematics_does_no_file_work(sources: dict[str, ast.Module], module: str) -> None:
    for name in imports(f"davae_core.{module}", sources[f"davae_core.{module}"]):
        assert name.split(".")[0] not in {"os", "pathlib", "json", "safetensors"}
        assert not name.startswith("davae_core.checkpoints")
