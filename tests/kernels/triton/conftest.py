"""Where the kernels of these tests run: in Triton's interpreter on a CPU, or compiled on a GPU.

A process can do one of the two: the kernels are bound to it when they are imported. With a GPU the
`cuda` tests run and the `cpu` ones skip, unless TRITON_INTERPRET=1 is set.
"""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    from elmo_compile.kernels.triton.storage import INTERPRETED

    if (request.param == "cpu") != bool(INTERPRETED):
        pytest.skip("the kernels of this process are bound to the other device")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param
