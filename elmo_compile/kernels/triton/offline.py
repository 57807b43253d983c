"""Compile the kernels for a chip that is not there, exactly as a call would launch them.

The drivers run on meta tensors while launches are recorded instead of made; each is then compiled
to a cubin, whose registers, spills and shared memory the bundled tools tell. Tried on triton 3.7.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from elmo_compile.kernels.triton.configs import assume_chip

_POINTERS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and how it is run."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cubin:
    """What the compiler made of a launch."""

    name: str
    registers: int
    spilled: int
    """Bytes a thread keeps in local memory."""
    shared: int
    """Bytes of shared memory a block takes."""
    warps: int
    instructions: int
    """In the whole kernel."""
    loop: int
    """In its largest loop that holds no other."""
    serialized: bool
    """Whether Hopper's asynchronous products wait for one another: ptxas says so, and goes on."""
    ptx: str


@contextlib.contextmanager
def record(chip: int) -> Iterator[list[Launch]]:
    """Record the launches of calls on meta tensors, planned for `chip` (90 is sm_90)."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in kernel.params]
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        arguments = dict(zip(names, args)) | kwargs
        launches.append(Launch(kernel=kernel, arguments=arguments, options=options))

    with assume_chip(chip), mock.patch.object(JITFunction, "run", run):
        yield launches


def _source(launch: Launch) -> ASTSource:
    """The kernel specialised as Triton's launcher does: aligned pointers, ones, multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, aligned = "constexpr", False
        if isinstance(value, Tensor):
            kind = "*" + _POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            kind = "fp32"
        elif isinstance(value, int) and not parameter.is_constexpr:
            kind = parameter.annotation_type or ("i64" if abs(value) >> 31 else "i32")
            free = parameter.do_not_specialize
            aligned = not free and value % 16 == 0
            kind = "constexpr" if value == 1 and not free else kind
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, chip: int) -> Cubin:
    """Compile one launch for a chip and read what it takes."""
    target = GPUTarget("cuda", chip, 32)
    # Kernels ask this for what the chip can do; without a driver it answers that nothing can.
    driver = SimpleNamespace(get_current_target=lambda: target)
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        compiled = triton.compile(_source(launch), target=target, options=launch.options)
    registers, spilled = _resources(compiled.asm["cubin"])
    instructions, loop = _counts(compiled.asm["cubin"])
    return Cubin(
        name=launch.kernel.__name__,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        warps=launch.options.get("num_warps", 4),
        instructions=instructions,
        loop=loop,
        serialized=_serialized(compiled.asm["ptx"]),
        ptx=compiled.asm["ptx"],
    )


def compile_call(call: Callable[[], Any], chip: int) -> list[Cubin]:
    """Compile each distinct launch that a call on meta tensors makes, for a chip."""
    with record(chip) as launches:
        call()
    distinct: dict[str, Launch] = {}
    for launch in launches:
        distinct.setdefault(f"{launch.kernel.__name__} {_source(launch).hash()}", launch)
    return [compile_launch(launch, chip) for launch in distinct.values()]


def _printed(tool: str, option: str, cubin: bytes) -> str:
    """What a bundled tool prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return subprocess.run(
            [tool, option, file.name], check=True, capture_output=True, text=True
        ).stdout
    finally:
        os.unlink(file.name)


def _serialized(ptx: str) -> bool:
    if "wgmma.mma_async" not in ptx:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "kernel.ptx")
        with open(source, "w") as file:
            file.write(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "--gpu-name", "sm_90a", "-v", source]
        done = subprocess.run(
            [*command, "-o", os.devnull], check=True, capture_output=True, text=True
        )
    return "serialized" in done.stdout + done.stderr


def _counts(cubin: bytes) -> tuple[int, int]:
    """(instructions, instructions of the largest innermost loop), by the bundled nvdisasm."""
    text = _printed(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    count = 0
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*);", line):
            count += found[1] != "NOP"
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1] == "BRA" and target:
                jumps.append((count, target[1]))
    loops = [(labels[to], end) for end, to in jumps if to in labels and labels[to] < end]
    inner = [one for one in loops if not any(_holds(one, other) for other in loops)]
    return count, max((end - start for start, end in inner), default=0)


def _holds(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one stretch of code holds another."""
    return one != other and one[0] <= other[0] and other[1] <= one[1]


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes in local memory) of a thread, by the bundled cuobjdump."""
    tool = triton.knobs.nvidia.cuobjdump.path
    text = _printed(tool, "-res-usage", cubin)
    registers = re.search(r"REG:(\d+)", text)
    memory = [int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text)]
    if registers is None or not memory:
        raise RuntimeError(f"{tool} -res-usage printed no resource line: {text!r}")
    return int(registers.group(1)), max(memory)
