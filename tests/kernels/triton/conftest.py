"""Where the kernels of these tests run: in Triton's interpreter on a CPU, or compiled on a GPU.

A process can do one of the two: the kernels are bound to it when they are imported. With a GPU the
`cuda` tests run and the `cpu` ones skip, unless TRITON_INTERPRET=1 is set.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    from elmo_compile.kernels.triton.storage import INTERPRETED

    if (request.param == "cpu") != bool(INTERPRETED):
        pytest.skip("the kernels of this process are bound to the other device")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out this directory's `slow` tests (interpreter, compiler) unless `-m` names them."""
    if "slow" in (config.option.markexpr or ""):
        return
    slow = [
        item
        for item in items
        if HERE in item.path.parents
        and item.get_closest_marker("slow")
        and not item.get_closest_marker("gpu")
    ]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
