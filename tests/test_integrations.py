"""accelerate knows the backend, whichever of the two is imported first."""

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
