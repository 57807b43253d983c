"""Who may import whom, read from the source; and where triton and private torch may be touched."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "elmo_compile"

# Layer -> layers it may import. `errors` and `config` may be imported by everyone.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "host_memory": set(),
    "numerics": set(),
    "programs": {"ops", "numerics", "host_memory"},
    "kernels": {"numerics", "programs", "host_memory"},
    "ops": {"kernels", "numerics", "programs"},
    "planner": {"numerics"},
    "report": {"planner"},
    "passes": {"ops", "planner", "report", "numerics", "programs"},
    "optim": {"ops", "numerics"},
    "heads": {"ops", "optim", "numerics"},
    "distributed": {"ops", "heads", "optim", "numerics"},
    "activations": set(),
    "lowering": {"activations"},
    "deferred": {"ops", "passes", "numerics"},
    "runtime": {"deferred", "lowering", "passes", "ops"},
    "backend": {"lowering", "runtime", "passes", "ops", "planner", "report"},
    "explain": {"backend", "report"},
    "topk": {"kernels", "ops", "planner", "numerics"},
    "integrations": {"backend"},
    "metrics": set(),
    "bench": {"kernels", "optim", "planner", "numerics"},
    "tune": {"bench", "kernels", "numerics"},
    "cli": {"bench", "explain", "planner", "report", "tune", "<root>"},
    "<root>": {
        "deferred",
        "distributed",
        "explain",
        "heads",
        "integrations",
        "metrics",
        "numerics",
        "ops",
        "optim",
        "report",
        "testing",
        "topk",
    },
}
ANYTHING = {"testing"}
"""Layers for users' tests: free to import all but Triton kernels."""

INSIDE_FUNCTIONS = {
    ("ops", "kernels"),
    ("ops", "programs"),
    ("bench", "kernels"),
    ("tune", "kernels"),
    ("cli", "bench"),
    ("cli", "explain"),
    ("cli", "tune"),
}
"""Edges that must not run at import time ..."""
PLAIN_RECORDS = {"elmo_compile.kernels.problem"}
"""... except for modules that hold records only."""

PRIVATE = ("_inductor", "_functorch", "_dynamo", "_C", "_guards", "_subclasses")
MAY_TOUCH_PRIVATE: dict[str, set[str]] = {
    # file -> the private torch packages it names; each says which versions it was tried on
    "elmo_compile/activations.py": {"_functorch", "_inductor"},
    "elmo_compile/backend.py": {"_guards"},
    "elmo_compile/deferred/functions.py": {"_C", "_guards"},
    "elmo_compile/deferred/gradient.py": {"_C"},
    "elmo_compile/deferred/origin.py": {"_subclasses"},
    "elmo_compile/deferred/targets.py": {"_C"},
    "elmo_compile/deferred/tensor.py": {"_C"},
    "elmo_compile/explain.py": {"_dynamo"},
    "elmo_compile/integrations.py": {"_dynamo"},
    "elmo_compile/kernels/aten/compiled.py": {"_C", "_dynamo"},
    "elmo_compile/kernels/aten/direct.py": {"_inductor"},
    "elmo_compile/kernels/aten/traced_once.py": {"_inductor"},
    "elmo_compile/lowering.py": {"_inductor"},
    "elmo_compile/ops/again.py": {"_C"},
    "elmo_compile/ops/fused.py": {"_C"},
    "elmo_compile/ops/hidden_gradients.py": {"_dynamo"},
    "elmo_compile/ops/reached.py": {"_C"},
    "elmo_compile/ops/second_pass.py": {"_C"},
    "passes/modes.py": {"_C"},
}


class Import(NamedTuple):
    """One imported module, and whether importing the file imports it."""

    module: str
    at_import: bool
    line: int


def sources() -> list[Path]:
    """Every Python file of the package; `elmo_compile/passes` is a link to `passes`."""
    inside = [p for p in (ROOT / PACKAGE).rglob("*.py") if p.parts[len(ROOT.parts) + 1] != "passes"]
    return sorted([*inside, *(ROOT / "passes").rglob("*.py")])


def module_name(path: Path) -> str:
    """elmo_compile.passes.find for passes/find.py; a package's name for its __init__.py."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "passes":
        parts.insert(0, PACKAGE)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    """The first part below the package; the package itself is `<root>`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "<root>"


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every import statement; those for type checkers only are left out."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, at_import, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            yield from imported_from(node, at_import)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children:
            yield from visit(child, at_import and not inside)

    yield from visit(tree, True)


def imported_from(node: ast.ImportFrom, at_import: bool) -> Iterator[Import]:
    """`from elmo_compile import kernels` imports a module, `from x import f` may import `x`."""
    assert node.level == 0, "relative import"
    for alias in node.names:
        below = f"{node.module}.{alias.name}"
        name = below if is_module(below) else str(node.module)
        yield Import(name, at_import, node.lineno)


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of this package or a private part of torch."""
    if not name.startswith(PACKAGE):
        return name.removeprefix("torch.") in PRIVATE
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def problems_of(path: Path, name: str, text: str) -> list[str]:
    """Every rule a file breaks, one sentence each."""
    own, found = layer(name), []
    for module, at_import, line in imports(ast.parse(text)):
        where = f"{path.name}:{line}: {name} imports {module}"
        if module.split(".")[0] == "triton" and not name.startswith(f"{PACKAGE}.kernels.triton"):
            found.append(f"{where}; triton is imported under kernels/triton only")
        if module.split(".")[0] != PACKAGE:
            continue
        other = layer(module)
        if own in ANYTHING:
            if module.startswith(f"{PACKAGE}.kernels.triton"):
                found.append(f"{where}; {own} must not import Triton kernels")
        elif other not in MAY_IMPORT[own] | {own, "errors", "config"}:
            found.append(f"{where}; {own} may import {sorted(MAY_IMPORT[own])}")
        elif (own, other) in INSIDE_FUNCTIONS and at_import and module not in PLAIN_RECORDS:
            found.append(f"{where} at import time; import it inside a function")
    return found


def private_parts(text: str) -> set[str]:
    """Private packages of torch a file imports or reaches through attributes."""
    tree = ast.parse(text)
    found = {module.split(".")[1] for module, *_ in imports(tree) if module.startswith("torch._")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
            found.add(node.attr)
    return found & set(PRIVATE)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_follow_the_layers(path):
    name = module_name(path)
    assert layer(name) in MAY_IMPORT or layer(name) in ANYTHING, f"{name} is in no layer"
    problems = problems_of(path, name, path.read_text(encoding="utf-8"))
    assert not problems, "\n".join(problems)


def test_private_torch_is_touched_where_it_is_listed_and_nowhere_else():
    found = {}
    for path in sources():
        parts = private_parts(path.read_text(encoding="utf-8"))
        if parts:
            found[path.relative_to(ROOT).as_posix()] = parts
    assert found == MAY_TOUCH_PRIVATE


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("elmo_compile.numerics.x", "import elmo_compile.ops", "numerics may import"),
        ("elmo_compile.passes.x", "from elmo_compile import kernels", "passes may import"),
        ("elmo_compile.passes.x", "from elmo_compile.kernels.problem import A", "passes may"),
        ("elmo_compile.ops.x", "from elmo_compile import kernels", "inside a function"),
        ("elmo_compile.ops.x", "class A:\n  from elmo_compile import kernels", "inside a"),
        ("elmo_compile.ops.x", "try:\n  import triton.language\nfinally: pass", "triton is"),
        ("elmo_compile.testing.x", "import elmo_compile.kernels.triton.y", "must not import"),
        ("elmo_compile.metrics.x", "import elmo_compile", "metrics may import"),
    ],
)
def test_the_rules_catch(name, text, message):
    (problem,) = problems_of(Path("x.py"), name, text)
    assert message in problem


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("elmo_compile.ops.x", "def f():\n    from elmo_compile import kernels"),
        ("elmo_compile.ops.x", "from elmo_compile.kernels.problem import HeadProblem"),
        ("elmo_compile.kernels.triton.x", "import triton"),
        ("elmo_compile.numerics.x", "from elmo_compile.errors import OptionError"),
        ("elmo_compile.numerics.x", "if TYPE_CHECKING:\n    import elmo_compile.passes"),
        ("elmo_compile.testing.x", "import elmo_compile.kernels.aten"),
    ],
)
def test_the_rules_allow(name, text):
    assert problems_of(Path("x.py"), name, text) == []


def test_private_parts_are_seen():
    assert private_parts("import torch._dynamo.config") == {"_dynamo"}
    assert private_parts("from torch import _C") == {"_C"}
    assert private_parts("from torch._guards import x") == {"_guards"}
    assert private_parts("import torch\ntorch._C.f()") == {"_C"}
    assert private_parts("import torch\ntorch._foreach_add_(a, b)") == set()
