"""Tests of the path that CUDA tensors take: on a GPU (`-m gpu`), or where there is none on the
device of `host_cuda.py`, on which `tests/test_cuda_path.py` runs them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from steps import CHUNK

HERE = Path(__file__).parent
PRETENDED = "host_cuda" in sys.modules

if not PRETENDED:
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them need a device."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not (PRETENDED or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip("needs a CUDA device"))


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def options(request: pytest.FixtureRequest) -> dict[str, object]:
    """Options of the backend under which small heads are rewritten."""
    return {"min_outputs": CHUNK, "chunk_size": CHUNK, "lower": request.param}


@contextlib.contextmanager
def _no_host_reads() -> Iterator[None]:
    if PRETENDED:
        from host_cuda import no_host_reads

        with no_host_reads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_host_reads() -> object:
    """A context in which the host must not wait for the device."""
    return _no_host_reads
