"""Imports go one way: a part imports only floors below its own, and no two modules import each other.

Read from the syntax trees, so that imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from b3 import registry
from b3.errors import InputError

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = re.compile(r"^\[project\.optional-dependencies\]\n(.*?)^\[", re.MULTILINE | re.DOTALL)
FLOORS = [
    ("registry", "errors", "memory", "peers", "signals"),
    ("locks",),
    ("files", "console", "html", "distributed"),
    ("config",),
    ("data",),
    ("model",),
    ("eval", "mining"),
    ("train",),
    ("integrations",),
    ("__main__",),
]
HEIGHT = {f"b3.{part}": height for height, parts in enumerate(FLOORS) for part in parts}
ENTRANCES = ("train", "eval_mmeb", "scripts", "benchmarks", "dev")  # above all floors; they may import one another


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    files = [ROOT / "train.py", ROOT / "eval_mmeb.py"]
    for folder in ("b3", "scripts", "benchmarks", "dev"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return {module_name(file): file for file in files}


def imports(file: Path, known: set[str]) -> set[str]:
    """Modules of this repository that a file imports anywhere in it."""
    result = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import in line {node.lineno}"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                result.add(below if below in known else str(node.module))
    return result & known


def graph() -> dict[str, set[str]]:
    files = modules()
    del files["b3"]  # exports and the version; imports nothing when it is imported
    return {name: imports(file, set(files)) - {name} for name, file in files.items()}


def part(module: str) -> str:
    return ".".join(module.split(".")[:2])


def height(module: str) -> int:
    if module.split(".")[0] in ENTRANCES:
        return len(FLOORS)
    return HEIGHT[part(module)]


def violations(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports of a floor above, or of a neighbour on the same floor."""
    bad = set()
    for module, names in edges.items():
        for name in names:
            is_inside = part(module) == part(name) or height(module) == len(FLOORS)
            same_floor_is_fine = height(module) == 0
            above = height(name) > height(module) or (height(name) == height(module) and not same_floor_is_fine)
            if above and not is_inside:
                bad.add((module, name))
    return bad


def circles(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Edges that lie on a circle (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    component: dict[str, int] = {}

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for name in edges[node]:
            if name not in index:
                visit(name)
            if name not in component:
                low[node] = min(low[node], low[name])
        if low[node] == index[node]:
            while node not in component:
                component[stack.pop()] = index[node]

    for node in edges:
        if node not in index:
            visit(node)
    return {(a, b) for a, names in edges.items() for b in names if component[a] == component[b]}


def test_every_part_has_a_floor():
    parts = {part(module) for module in modules() if module.startswith("b3.")}
    assert parts <= set(HEIGHT), f"give {sorted(parts - set(HEIGHT))} a floor"


def test_imports_go_one_way():
    bad = violations(graph())
    assert not bad, f"a floor may import only floors below: {sorted(bad)}"


def test_no_two_modules_import_each_other():
    bad = circles(graph())
    assert not bad, f"modules import each other: {sorted(bad)}"


def test_every_extra_is_imported_somewhere():
    """A package that users are told to install is one that b3 imports, or a tracker that accelerate knows.

    Those of `test` and `docs` are programs that develop b3.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    sources = "\n".join(file.read_text() for file in (ROOT / "b3").rglob("*.py"))
    modules = {"faiss_cpu": "faiss", "faiss_gpu_cu12": "faiss"}
    extras = re.findall(r"^(\w+) = (\[.*?\])", OPTIONAL.search((ROOT / "pyproject.toml").read_text())[1], re.M | re.S)
    assert {name for name, _ in extras} >= {"test", "faiss", "trackers"}
    for extra, packages in extras:
        for package in re.findall(r'"([\w-]+)[^"]*"', packages) if extra not in ("test", "docs") else ():
            name = package.replace("-", "_")
            used = re.search(rf"\b{modules.get(name, name)}\b", sources)
            assert used or name in LOGGER_TYPE_TO_CLASS, f"nothing imports {package} of the extra {extra}"


def test_the_floors_are_seen():
    edges = {
        "b3.data.x": {"b3.train.y"},
        "b3.train.y": {"b3.data.x"},
        "b3.eval.a": {"b3.mining.b"},
        "b3.mining.b": set(),
    }
    assert violations(edges) == {("b3.data.x", "b3.train.y"), ("b3.eval.a", "b3.mining.b")}
    assert circles(edges) == {("b3.data.x", "b3.train.y"), ("b3.train.y", "b3.data.x")}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in registry.KINDS for name in registry.KINDS[kind]])
def test_every_entry_of_the_registry_loads(kind: str, name: str):
    value = registry.load(kind, name)
    assert value.name == name if kind == "benchmark" else callable(value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="there is no miner 'metro'; choose from anneal, kmeans, paper, random"):
        registry.load("miner", "metro")
