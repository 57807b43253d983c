"""torch knows the backend without an installed package, and accelerate in any order of imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
import os
os.environ["ACCELERATE_DYNAMO_BACKEND"] = "elmo"
{first}
{second}
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
assert TorchDynamoPlugin().to_kwargs()["backend"] == "elmo"
assert DynamoBackend("ELMO") in list(DynamoBackend)
assert "ELMO" in DynamoBackend.list()
"""
ORDERS = [
    ("import accelerate", "import elmo_compile"),
    ("import elmo_compile", "import accelerate"),
]


@pytest.mark.parametrize(("first", "second"), ORDERS)
def test_accelerate(first: str, second: str) -> None:
    code = CHECK.format(first=first, second=second)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


UNINSTALLED = """
import importlib.metadata as metadata
found = metadata.entry_points
def without(**which):
    hidden = which.get("group") == "torch_dynamo_backends"
    return metadata.EntryPoints() if hidden else found(**which)
metadata.entry_points = without
import torch, elmo_compile
assert "elmo" in torch.compiler.list_backends()
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
made = torch.compile(model, backend="elmo", options={"lower": "eager"})(torch.ones(2, 3))
assert elmo_compile.last_report() is not None
"""


def test_a_checkout_that_is_not_installed() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", UNINSTALLED], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
