"""docs/logits.md lists the operations that make no values: those of the tables, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from elmo_compile.deferred import tables

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


def test_the_page_has_the_tables() -> None:
    rows = re.findall(r"^\| \*\*.*?\*\* \| (.*?) \|", PAGE.read_text(), flags=re.MULTILINE)
    documented = re.findall(r"`([^`]+)`", " ".join(rows))
    listed = (
        tables.LOSSES | tables.TOPS | tables.ROWS | tables.STAYS_DEFERRED
    ) | tables.PERMUTES | tables.PARTS  # fmt: skip
    assert len(documented) == len(set(documented))
    assert set(documented) == {name(function) for function in listed}
