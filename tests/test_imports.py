"""Who may import whom, read from the syntax trees: rooms, no cycles, an upstream without the trainer."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

from pretrain.errors import UserError
from pretrain.registry import load_method, method_names

TRAINING_ONLY = {"deepspeed", "hydra"}
LIGHT = ("pretrain.upstream", "pretrain.models", "pretrain.features", "pretrain.data", "pretrain.labelling")


def modules_of(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


PRETRAIN, RECIPES, TOOLS = (modules_of(package) for package in ("pretrain", "recipes", "tools"))


def statements(tree: ast.AST, everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements: all of them, or those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif everywhere or not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_for_types_only(node)):
            yield from statements(node, everywhere)


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def imports(path: Path, everywhere: bool = True) -> frozenset[str]:
    """Dotted names that a file imports; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in statements(ast.parse(path.read_text()), everywhere):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path}: line {node.lineno}: a relative import; write the full name"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def rooms(names: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def inside(graph: dict[str, Path], names: frozenset[str]) -> set[str]:
    """The modules of `graph` that importing `names` runs, parent packages included."""
    parents = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    return parents & graph.keys()


@pytest.mark.parametrize("module", PRETRAIN)
def test_pretrain_imports_neither_recipes_nor_tools(module: str) -> None:
    assert not rooms(imports(PRETRAIN[module])) & {"recipes", "tools", "tests"}


def test_pretrain_finds_recipes_in_one_place_only() -> None:
    found = []
    for module, path in PRETRAIN.items():
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                found += [
                    (module, function.name)
                    for call in calls
                    if ast.unparse(call.func).endswith("import_module") and "recipes" in ast.unparse(call.args[0])
                ]
    assert found == [("pretrain.registry", "_package")]


@pytest.mark.parametrize("module", RECIPES)
def test_recipes_do_not_import_each_other(module: str) -> None:
    names = imports(RECIPES[module])
    assert "tools" not in rooms(names)
    own = ".".join(module.split(".")[:2])
    assert {".".join(name.split(".")[:2]) for name in names if name.startswith("recipes.")} <= {own}


@pytest.mark.parametrize("module", TOOLS)
def test_tools_import_pretrain_only(module: str) -> None:
    ours = {"pretrain", "recipes", "tools", "tests"}
    assert rooms(imports(TOOLS[module])) & ours <= {"pretrain"}


@pytest.mark.parametrize("module", [name for name in PRETRAIN if name.startswith(LIGHT)])
def test_what_an_upstream_needs_never_names_the_trainers_libraries(module: str) -> None:
    """Not even inside functions."""
    assert not rooms(imports(PRETRAIN[module])) & TRAINING_ONLY


def test_deepspeed_is_imported_in_one_file() -> None:
    assert [name for name, path in PRETRAIN.items() if "deepspeed" in rooms(imports(path))] == [
        "pretrain.training.deepspeed_quirks"
    ]


def test_importing_the_light_modules_loads_no_trainer() -> None:
    """What the trees cannot show: imports of imports, of other projects too."""
    light = [name for name in PRETRAIN if name.startswith(LIGHT)]
    script = f"import importlib, sys; [importlib.import_module(name) for name in {light}]\n"
    script += f"print(sorted({TRAINING_ONLY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_no_cycles_in_pretrain() -> None:
    # A module's own packages are being imported when it runs, so that they are no dependency of it; for another room
    # they are: a package whose __init__ is empty depends on nothing, one that exports depends on what it exports.
    graph = {
        name: {
            other
            for other in inside(PRETRAIN, imports(path, everywhere=False))
            if not f"{name}.".startswith(f"{other}.")
        }
        for name, path in PRETRAIN.items()
    }
    order: list[str] = []
    while len(order) < len(graph):
        ready = sorted(name for name in graph if name not in order and graph[name] <= set(order))
        left = sorted(set(graph) - set(order))
        assert ready, f"modules that import each other in a circle, or depend on such: {left}"
        order += ready


@pytest.mark.parametrize("module", [name for name in PRETRAIN if name.startswith("pretrain.training.")])
def test_the_trainer_names_no_method(module: str) -> None:
    text = PRETRAIN[module].read_text().lower()
    assert [name for name in method_names() if re.search(rf"\b{name}\b", text)] == []


def test_nothing_asks_for_a_methods_class() -> None:
    """The trainer works on `Method`; what differs between methods is the method's own."""
    calls = [
        node
        for node in ast.walk(ast.parse(PRETRAIN["pretrain.training.trainer"].read_text()))
        if isinstance(node, ast.Call)
    ]
    assert [ast.unparse(call) for call in calls if ast.unparse(call.func) == "isinstance"] == []


@pytest.mark.parametrize("missing", ["Method", "Encoder"])
def test_a_package_that_lacks_a_class_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"recipes.apc.{missing}")
    with pytest.raises(UserError, match=rf"recipes/apc/__init__\.py: names no {missing}; import the method's class"):
        load_method("apc")
