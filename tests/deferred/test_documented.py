"""docs/logits.md lists the operations that make no values: those of the tables, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch.fx.node import _get_qualified_name

from elmo_compile.deferred import tables
from elmo_compile.deferred.step import Step

PAGE = Path(__file__).resolve().parents[2] / "docs" / "logits.md"
OTHER_NAMES = {
    "multiply": "mul", "rmul": "mul", "divide": "div", "true_divide": "div", "truediv": "div",
    "rtruediv": "div", "rdiv": "div", "log_sigmoid": "logsigmoid",
    "radd": "add", "subtract": "sub", "rsub": "sub", "negative": "neg",
    "absolute": "abs", "invert": "bitwise_not", "greater": "gt", "greater_equal": "ge",
    "less": "lt", "less_equal": "le", "not_equal": "ne", "getitem": "[...]",
    "iter": "for part in logits", "linalg_vector_norm": "vector_norm",
}  # fmt: skip


def name(function: Any) -> str:
    found = function.__name__
    if found == "__get__":  # a property
        found = function.__self__.__name__
    found = found.strip("_")
    return OTHER_NAMES.get(found, found)


LISTED = (
    tables.LOSSES | tables.TOPS | tables.ROWS | tables.STAYS_DEFERRED
) | tables.PERMUTES | tables.PARTS  # fmt: skip


def test_the_page_has_the_tables() -> None:
    rows = re.findall(r"^\| \*\*.*?\*\* \| (.*?) \|", PAGE.read_text(), flags=re.MULTILINE)
    documented = re.findall(r"`([^`]+)`", " ".join(rows))
    assert len(documented) == len(set(documented))
    assert set(documented) == {name(function) for function in LISTED}


def title(function: Any) -> str:
    """The same in every process."""
    owner = getattr(function, "__objclass__", None) or getattr(function, "__module__", None)
    return f"{getattr(owner, '__name__', owner)}.{function.__name__}"


@pytest.mark.parametrize(
    "function", sorted(LISTED - tables.PERMUTES - tables.PARTS, key=title), ids=title
)
def test_generated_code_can_name_it(function: Any) -> None:
    graph = fx.Graph()
    z = graph.placeholder("z")
    node = Step(function, (), {}).emit(graph, z, [], z)
    if node.op == "call_function":
        named = eval(_get_qualified_name(function), {"torch": torch})
    else:
        named = getattr(torch.Tensor, node.target)  # type: ignore[arg-type]
    assert named is function
