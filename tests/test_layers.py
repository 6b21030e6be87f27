"""Imports point down only: a module knows its own layer and those below, and the lowest know neither Ray nor torch."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "ray_dnn"
ROOT = Path(__file__).parent.parent / PACKAGE

# A module, or a package with all that is in it -> its layer. The longest name that matches counts.
LAYERS = {
    "errors": 0,
    "events": 0,
    "config": 0,
    "placement": 1,
    "plan": 1,
    "balance": 1,
    "tree": 1,
    "membership": 1,
    "sampler": 1,
    "ledger": 1,
    "phases": 1,
    "processes": 1,
    "marks": 1,
    "liveness": 1,
    "setbacks": 1,
    "identity": 1,
    "network": 1,
    "engine": 2,
    "comm": 2,
    "strategies": 2,
    "parallel": 2,
    "checkpoint": 2,
    "tensorfile": 2,
    "driver": 3,
    "agent": 3,
    "cluster": 3,
    "feed": 3,
    "storage": 3,
    "admission": 3,
    "fleet": 3,
    "following": 3,
    "faults": 3,
    "requests": 3,
    "underway": 3,
    "draining": 3,
    "lookout": 3,
    "sharing": 3,
    "loop": 3,
    "watcher": 3,
    "guard": 3,
    "portable": 3,
    "in_host": 3,
    "recorder": 3,
    "checkpoints": 3,
    "resume": 3,
    "trainer": 4,
    "limits": 4,
    "testing": 4,
    "replay": 4,
    "": 4,  # ray_dnn/__init__.py, the public face: others reach it from layer 4 up, it reaches everything
    "cli": 5,
    "__main__": 5,
    "progress": 5,
    "report": 5,
}
FORBIDDEN = {0: {"torch", "ray"}, 1: {"torch", "ray"}, 2: {"ray"}}  # layer -> libraries its modules never import


class Source(NamedTuple):
    text: str
    is_package: bool  # an __init__.py, whose relative imports start from the package itself


Sources = dict[str, Source]  # by module name below the package; "" is the package


def read_sources(root: Path) -> Sources:
    sources = {}
    for path in root.rglob("*.py"):
        is_package = path.name == "__init__.py"
        module = path.parent if is_package else path.with_suffix("")
        sources[".".join(module.relative_to(root).parts)] = Source(path.read_text(), is_package)
    return sources


def layer_of(module: str) -> int | None:
    """The layer of a module below the package; None where the table says nothing about it."""
    if not module:
        return LAYERS[""]
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((LAYERS[prefix] for prefix in prefixes if prefix in LAYERS), None)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below this one, functions and classes included, except what only a type checker runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for alternative in child.orelse:
                yield alternative
                yield from runtime_nodes(alternative)
        else:
            yield child
            yield from runtime_nodes(child)


def imports(module: str, source: Source) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything the module imports; `from a import b` is a.b, module or not."""
    full = f"{PACKAGE}.{module}".rstrip(".").split(".")
    for node in runtime_nodes(ast.parse(source.text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - source.is_package
            base = full[: len(full) - up] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def target_module(name: str, sources: Sources) -> str:
    """The module below the package that holds a dotted name: `ray_dnn.plan.Plan` is in `plan`."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in sources:
        parts.pop()
    return ".".join(parts)


def violations(sources: Sources) -> list[str]:
    found = []
    for module, source in sorted(sources.items()):
        layer = layer_of(module)
        if layer is None:
            found.append(f"{PACKAGE}.{module} has no layer: add it to LAYERS in tests/test_layers.py")
            continue
        for line, name in imports(module, source):
            library = name.split(".")[0]
            where = f"{PACKAGE}.{module}:{line}"
            if library in FORBIDDEN.get(layer, ()):
                found.append(f"{where} is in layer {layer}, which never imports {library}")
            elif library == PACKAGE and module:
                target = target_module(name, sources)
                target_layer = layer_of(target)
                if target_layer is not None and target_layer > layer:
                    found.append(f"{where} is in layer {layer} and imports {name} from layer {target_layer}")
    return found


def test_imports_point_down_only() -> None:
    sources = read_sources(ROOT)
    assert sources, f"no modules found in {ROOT}"
    assert violations(sources) == []


def found_in(tmp_path: Path, files: dict[str, str]) -> list[str]:
    for name, text in {"__init__.py": "from .trainer import Trainer", "trainer.py": "", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return violations(read_sources(tmp_path))


def test_downward_imports_and_imports_for_types_pass(tmp_path: Path) -> None:
    files = {
        "plan.py": "if TYPE_CHECKING:\n    import torch\n    from .trainer import Trainer",
        "engine/__init__.py": "from .step import run",
        "engine/step.py": "import torch\nfrom ..plan import Plan\nfrom . import layout",
        "engine/layout.py": "from ray_dnn import plan",
        "driver.py": "import ray\nfrom ray_dnn.engine.step import run",
        "cli.py": "from ray_dnn import Trainer",
    }
    assert found_in(tmp_path, files) == []


def test_an_upward_import_is_caught_in_every_form(tmp_path: Path) -> None:
    files = {
        "driver.py": "",
        "plan.py": "def f():\n    from ray_dnn.driver import Driver",
        "tree.py": "import ray_dnn.driver",
        "sampler.py": "from . import driver",
        "ledger.py": "from ray_dnn import Trainer",
        "engine/__init__.py": "from ..driver import Driver",
        "engine/step.py": "if typing.TYPE_CHECKING:\n    pass\nelse:\n    from ..driver import Driver",
    }
    assert found_in(tmp_path, files) == [
        "ray_dnn.engine:1 is in layer 2 and imports ray_dnn.driver.Driver from layer 3",
        "ray_dnn.engine.step:4 is in layer 2 and imports ray_dnn.driver.Driver from layer 3",
        "ray_dnn.ledger:1 is in layer 1 and imports ray_dnn.Trainer from layer 4",
        "ray_dnn.plan:2 is in layer 1 and imports ray_dnn.driver.Driver from layer 3",
        "ray_dnn.sampler:1 is in layer 1 and imports ray_dnn.driver from layer 3",
        "ray_dnn.tree:1 is in layer 1 and imports ray_dnn.driver from layer 3",
    ]


def test_a_forbidden_library_is_caught_inside_functions_too(tmp_path: Path) -> None:
    files = {
        "config.py": "class A:\n    def f(self):\n        import torch.nn as nn",
        "plan.py": "from ray.data import Dataset",
        "engine/__init__.py": "import torch\ntry:\n    import ray\nexcept ImportError:\n    pass",
    }
    assert found_in(tmp_path, files) == [
        "ray_dnn.config:3 is in layer 0, which never imports torch",
        "ray_dnn.engine:3 is in layer 2, which never imports ray",
        "ray_dnn.plan:1 is in layer 1, which never imports ray",
    ]


def test_a_module_without_a_layer_is_caught(tmp_path: Path) -> None:
    assert found_in(tmp_path, {"plans.py": ""}) == [
        "ray_dnn.plans has no layer: add it to LAYERS in tests/test_layers.py"
    ]
