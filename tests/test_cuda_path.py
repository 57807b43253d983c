"""The path of CUDA tensors, on a device that lives in host memory (`tests/cuda/host_cuda.py`).

In processes of their own: torch must find the device when it is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: -m gpu tests/cuda"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA"),
]


def run(*arguments: str, **environment: str) -> None:
    """pytest on the pretended device."""
    where = {"PYTHONPATH": str(HERE / "cuda"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "pytest", "-p", "host_cuda", "--show-capture=no", *arguments]
    done = subprocess.run(
        command, cwd=HERE.parent, env={**os.environ, **where}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "which", ["gpu and not slow", pytest.param("gpu and slow", marks=pytest.mark.slow)]
)
def test_what_is_written_for_a_device(which):
    run("-vv", "-m", which, str(HERE / "cuda"))


NOT_THERE = {
    "tests/test_updates.py": ["share_code"],
    "tests/test_promises.py": ["stored_weights", "lowerings"],
    "tests/optim/test_update_at_step.py": ["dense_targets_are_kept_sparse"],
    "tests/optim/test_ordinary.py": ["sparse"],
    "tests/deferred/test_loops.py": ["the_loss_pass_keeps_the_top"],
    "tests/heads/test_compiled_heads.py": ["other_backends"],
}
"""Files written for a CPU, and tests in them of what is only there."""


@pytest.mark.slow
@pytest.mark.parametrize("file", NOT_THERE)
def test_what_is_written_for_a_cpu(file):
    left_out = " and ".join(f"not {name}" for name in ["inductor", *NOT_THERE[file]])
    run("-vv", "-k", left_out, str(HERE.parent / file), HOST_CUDA_DEFAULT="1")
