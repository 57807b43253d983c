"""What every test directory has in common."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# No test runs by tiles that were tuned on this machine: nothing is ever written here.
os.environ.setdefault(
    "ELMO_COMPILE_CACHE_DIR", str(Path(tempfile.gettempdir()) / "elmo-no-tuned-tiles")
)
# Threads that wait leave the core to the other worker: a fifth less time on two cores. Read when
# torch is loaded, and inherited by the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out `slow` tests (interpreter, compiler) unless `-m` names them or a GPU runs them."""
    if "slow" in (config.option.markexpr or ""):
        return
    slow = [
        item
        for item in items
        if item.get_closest_marker("slow") and not item.get_closest_marker("gpu")
    ]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
