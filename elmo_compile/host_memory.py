"""Large tensors in host memory: those that are made anew at every step, and scratch that is not.

What such a step costs beside its arithmetic is first touches: 262 144 page faults for a gigabyte in
pages of 4 KiB, 0.4 of a step's three products (benchmarks/NOTES.md). Linux has larger pages for who
asks; NumPy asks in this way from 4 MiB on, torch with THP_MEM_ALLOC_ENABLE=1.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGE = 4 << 20
"""Bytes from which on huge pages (2 MiB on x86-64) are asked for."""


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """`torch.empty`, in huge pages where that is large, in host memory, and Linux gives them."""
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    if made.device.type == "cpu" and made.nbytes >= LARGE:
        _ask_for_huge_pages(made.data_ptr(), made.nbytes)
    return made


def _ask_for_huge_pages(address: int, size: int) -> None:
    """Advice on the whole pages of a range, which the kernel may refuse: then they are small."""
    advise = _madvise()
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is not None and length > 0:
        advise(first, length, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """madvise(2) of the C library; None where there is no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    call: Callable[[int, int, int], int] = function
    return call


SCRATCH = 64 << 20
"""Bytes of scratch that are kept for the next call."""

_free: list[Tensor] = []
"""Scratch that nobody uses, flat, what was used last at the end."""
_lock = threading.RLock()


def scratch(
    owner: object, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """`torch.empty` for what a call computes in; where large, taken over from an earlier call.

    glibc's allocator (before 2.38) does not reuse the place of an aligned block of up to 32 MiB
    once anything small lies in it: a process grew by such a block at every step.

    Args:
        owner: who uses the tensor; when it dies, the memory is another call's. Nothing that
            outlives it may share the tensor's memory.
    """
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if torch.device(device).type != "cpu" or not LARGE <= size <= SCRATCH:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    flat = _taken(size)
    weakref.finalize(owner, _free.append, flat).atexit = False
    return flat.view(dtype).view(tuple(shape))


def _taken(size: int) -> Tensor:
    """Flat scratch that nobody uses. What owners give back in the meantime is put behind."""
    with _lock:
        for index in range(len(_free)):
            if len(_free[index]) == size:
                return _free.pop(index)
        while _free and size + sum(map(len, _free)) > SCRATCH:
            del _free[0]
    with torch.inference_mode(False):
        return empty((size,), torch.uint8)


def forget_scratch() -> None:
    """Give back to the system what is kept for calls to come."""
    with _lock:
        _free.clear()
