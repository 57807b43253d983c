"""What a process has of host memory: bytes of tensors, and bytes that are resident (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elmo_compile.host_memory import forget_scratch


def allocated_now() -> int:
    """Bytes of the memory that Python's tensors on the CPU hold."""
    gc.collect()
    forget_scratch()
    storages = {}
    for found in gc.get_objects():
        # Fake tensors and other wrappers have a size but no memory.
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_peak(step: Callable[[], Any]) -> int:
    """Bytes resident at the peak of a step, Python and its libraries included."""
    gc.collect()
    forget_scratch()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    step()
    return resident("VmHWM")


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
