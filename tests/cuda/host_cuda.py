"""A pytest plugin: a CUDA device in host memory, for a machine without one.

    PYTHONPATH=tests/cuda python -m pytest -p host_cuda -m gpu tests/cuda

`host_cuda.cpp` gives torch the device; here it is built and loaded before torch, and what torch
asks of a CUDA driver in Python is answered. Triton's interpreter runs kernels on its memory as it
is: this package's, and those that Inductor writes for a GPU (in one program each; what they take
from libdevice is numpy's). With HOST_CUDA_DEFAULT=1 tensors are made on it unless a test says
otherwise, so that tests written for a CPU take a GPU's path.
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
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

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

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

HOPPER = SimpleNamespace(
    name="NVIDIA H200, pretended",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=60 << 20,
    total_memory=140 << 30,
    warp_size=32,
    regs_per_multiprocessor=1 << 16,
    regs_per_block=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    is_integrated=0,
    is_multi_gpu_board=0,
    gcnArchName="",
    uuid="",
)


class _Event:
    def __init__(self, *given: Any, **more: Any) -> None:
        self.at = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Stream:
    def record_event(self) -> _Event:
        """An event that is over."""
        return _Event()

    def wait_stream(self, other: Any) -> None:
        """There is nothing to wait for."""


class _Graph:
    """A CUDA graph: the operations of the C++ side and the kernels launched between them."""

    capturing: ClassVar[_Graph | None] = None

    def __init__(self) -> None:
        self.launches: list[tuple[int, Any]] = []
        """(operations recorded before it, launch)."""
        self.first = self.last = 0

    def capture_begin(self, *given: Any, **more: Any) -> None:
        self.first = torch.ops.host_cuda.recorded()
        torch.ops.host_cuda.capture(True)
        _Graph.capturing = self

    def capture_end(self) -> None:
        _Graph.capturing = None
        self.last = torch.ops.host_cuda.recorded()
        torch.ops.host_cuda.capture(False)

    def replay(self) -> None:
        """Everything once more."""
        done = self.first
        for before, launch in self.launches:
            torch.ops.host_cuda.replay(done, before)
            launch()
            done = before
        torch.ops.host_cuda.replay(done, self.last)


@contextlib.contextmanager
def _graph(graph: _Graph, *given: Any, **more: Any) -> Iterator[None]:
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


def _answer_for_the_driver() -> None:
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.Event = _Event
    cuda.set_device = lambda device: None
    cuda._sleep = lambda cycles: None
    cuda.synchronize = lambda device=None: None
    cuda.get_device_capability = lambda device=None: (HOPPER.major, HOPPER.minor)
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8, device="cpu")
    cuda.set_rng_state = lambda state, device=None: None
    torch.version.cuda = "13.0"
    cuda._exchange_device = lambda device: 0
    cuda._maybe_exchange_device = lambda device: 0
    cuda.current_device = lambda: 0
    cuda.current_stream = lambda device=None: _Stream()
    cuda.Stream = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.CUDAGraph = _Graph
    cuda.graph = _graph
    cuda.is_current_stream_capturing = lambda: _Graph.capturing is not None
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
    launch = executor.__call__

    def recorded(self: Any, *args: Any, **named: Any) -> Any:
        if _Graph.capturing is not None:
            held = [value.detach() if isinstance(value, Tensor) else value for value in args]
            again = {k: v.detach() if isinstance(v, Tensor) else v for k, v in named.items()}
            before = torch.ops.host_cuda.recorded()
            _Graph.capturing.launches.append((before, lambda: launch(self, *held, **again)))
        return launch(self, *args, **named)

    executor.__call__ = recorded


class _Driver:
    """Triton's, for a chip that only compilers ask about."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * HOPPER.major + HOPPER.minor, HOPPER.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class _Libdevice:
    """Functions of tiles by their names in numpy."""

    NAMES: ClassVar = {"rsqrt": lambda v: 1 / np.sqrt(v), "pow": np.power, "rint": np.rint}

    def __getattr__(self, name: str) -> Any:
        function = self.NAMES.get(name) or getattr(np, name)

        def applied(*tiles: Any) -> Any:
            from triton.runtime.interpreter import TensorHandle

            first = tiles[0]
            made = function(*(tile.handle.data for tile in tiles)).astype(first.handle.data.dtype)
            return type(first)(TensorHandle(made, first.dtype.scalar), first.type)

        return applied


class _InductorKernel:
    """One of Inductor's kernels, run by one program that holds all of it."""

    HEAD = """import torch
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import *
from host_cuda import libdevice, libdevice as tl_math
"""
    SIZES: ClassVar = {"X": "xnumel", "Y": "ynumel", "R0_": "r0_numel", "R": "rnumel"}

    def __init__(self, name: str, source: str) -> None:
        source = source[source.index("@triton.jit") :]
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(self.HEAD + source)
        spec = importlib.util.spec_from_file_location(Path(file.name).stem, file.name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.kernel = getattr(module, name if hasattr(module, name) else "triton_")
        self.names = self.kernel.arg_names

    def run(self, *arguments: Any, stream: Any = None, **more: Any) -> None:
        """A launch, as Inductor's code writes it."""
        import triton

        blocks = {name: name[: -len("BLOCK")] for name in self.names if name.endswith("BLOCK")}
        given = dict(zip((name for name in self.names if name not in blocks), arguments))
        sizes = {
            name: max(1, triton.next_power_of_2(given[self.SIZES[which]]))
            for name, which in blocks.items()
        }
        self.kernel[(1, 1, 1)](**given, **sizes)


def _let_inductor_compile() -> None:
    import torch._C._dynamo.guards as guards
    import torch._inductor.async_compile as async_compile
    import torch._inductor.config as config
    from triton.runtime import driver

    driver.set_active(_Driver())
    config.compile_threads = 1
    config.force_disable_caches = True
    inner: Any = torch._C
    inner._cuda_getCurrentRawStream = lambda device: 0
    changed: Any = guards
    changed._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    compiler: Any = async_compile.AsyncCompile
    compiler.triton = lambda self, name, source, device_str="cuda": _InductorKernel(name, source)


libdevice = _Libdevice()
_answer_for_the_driver()
_move_storages()
_run_kernels_in_place()
_let_inductor_compile()


@contextlib.contextmanager
def kernels_launched() -> Iterator[set[Any]]:
    """Collects the Triton kernels that are launched, as its compiler tells them apart."""
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    launch, found = executor.__call__, set()

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if type(value) is int:
            return int, value == 1, value % 16 == 0
        return float if type(value) is float else str(value)

    def noted(self: Any, *args: Any, **named: Any) -> Any:
        names = tuple((name, kind(value)) for name, value in sorted(named.items()))
        found.add((self.fn.__name__, tuple(map(kind, args)), names))
        return launch(self, *args, **named)

    executor.__call__ = noted
    try:
        yield found
    finally:
        executor.__call__ = launch


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
