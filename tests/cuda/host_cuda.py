"""A pytest plugin: a CUDA device in host memory, for a machine without one.

    PYTHONPATH=tests/cuda python -m pytest -p host_cuda -m gpu tests/cuda

`host_cuda.cpp` gives torch the device; here it is built and loaded before torch, and what torch
asks of a CUDA driver in Python is answered. Triton's interpreter runs kernels on its memory as it
is; Inductor has nothing to compile for, and graphs run eagerly. With HOST_CUDA_DEFAULT=1 tensors
are made on it unless a test says otherwise, so that tests written for a CPU take a GPU's path.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("host_cuda.cpp")


def _library() -> Path:
    """The device's code, built if it is not there yet."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch_folder = Path(found.origin).parent
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"elmo-host-cuda-{os.getuid()}-{key}.so"
    if not built.exists():
        include, lib = torch_folder / "include", torch_folder / "lib"
        part = built.with_suffix(f".{os.getpid()}")
        command = [
            "g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{include}",
            f"-I{include}/torch/csrc/api/include", str(SOURCE), "-o", str(part), f"-L{lib}",
            "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        part.rename(built)
    return built


assert "torch" not in sys.modules, "host_cuda comes before torch: -p host_cuda"
os.environ["TRITON_INTERPRET"] = "1"
ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

HOPPER = SimpleNamespace(
    name="NVIDIA H200, pretended",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=60 << 20,
    total_memory=140 << 30,
)


class _Event:
    def synchronize(self) -> None:
        """There is nothing to wait for."""


class _Stream:
    def record_event(self) -> _Event:
        """An event that is over."""
        return _Event()


def _answer_for_the_driver() -> None:
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda._exchange_device = lambda device: 0
    cuda._maybe_exchange_device = lambda device: 0
    cuda.current_device = lambda: 0
    cuda.current_stream = lambda device=None: _Stream()
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_properties = lambda device=None: HOPPER
    cuda.mem_get_info = lambda device=None: (HOPPER.total_memory, HOPPER.total_memory)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    whole = torch.empty(0, dtype=torch.uint8, device="cuda")
    return whole.set_(storage, 0, (storage.nbytes(),), (1,))


def _move_storages() -> None:
    """Copies of storages, which torch makes itself (`copy.deepcopy`, `torch.save`, `load`)."""
    plain: Any = torch.UntypedStorage
    clone, cpu = plain.clone, plain.cpu

    def here(storage: torch.UntypedStorage) -> bool:
        return storage.device.type == "cuda"

    plain.clone = lambda s: _bytes(s).clone().untyped_storage() if here(s) else clone(s)
    plain.cpu = lambda s: _bytes(s).cpu().untyped_storage() if here(s) else cpu(s)

    def restored(storage: Any, location: str) -> Any:
        if not location.startswith("cuda"):
            return None
        on_cpu = torch.empty(0, dtype=torch.uint8, device="cpu").set_(
            storage, 0, (storage.nbytes(),), (1,)
        )
        return on_cpu.to("cuda").untyped_storage()

    def tag(storage: Any) -> str | None:
        return "cuda:0" if here(storage) else None

    torch.serialization.register_package(-1, tag, restored)


def _argument(value: Any) -> Any:
    """A kernel's argument in the interpreter: a tensor's own memory."""
    if not isinstance(value, Tensor):
        return value
    assert value.is_cuda, "Pointer argument cannot be accessed from Triton (cpu tensor?)"
    return torch.ops.host_cuda.host(value.detach())


def _run_kernels_in_place() -> None:
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    executor._init_args_hst = lambda self, args, named: (
        [_argument(value) for value in args],
        {name: _argument(value) for name, value in named.items()},
    )
    executor._restore_args_dev = lambda *args: None


_answer_for_the_driver()
_move_storages()
_run_kernels_in_place()


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    """Within it a value of the device that the host reads is an error."""
    torch.ops.host_cuda.allow_reads(False)
    try:
        yield
    finally:
        torch.ops.host_cuda.allow_reads(True)


@pytest.fixture(autouse=os.environ.get("HOST_CUDA_DEFAULT") == "1")
def _made_on_the_device() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
