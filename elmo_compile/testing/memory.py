"""Peak bytes of a function: an exact, instant check that a large tensor never existed (CPU).

`peak_bytes` counts tensors that go through torch's dispatcher, by name; memory that Inductor's
generated code allocates for itself does not. `allocated_peak` counts what torch's allocator hands
out, compiled code and temporaries of torch's own operations included. A library's scratch space is
in neither.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elmo_compile.host_memory import forget_scratch


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages created while it is active, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes of storages created since entry that still exist."""
        self.peak = 0
        """The largest `live` has been."""
        self._seen: set[int] = set()

    def __enter__(self) -> PeakBytes:
        forget_scratch()  # what a call would take over from an earlier one counts
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            # Fake and wrapper tensors have a size but no memory.
            real = type(t) in (torch.Tensor, torch.nn.Parameter)
            if real and t.layout == torch.strided and _key(t) not in given:
                self._count(t)
        return result

    def _count(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _key(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata if t.layout == torch.strided else 0


def peak_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Peak bytes of tensors that live during `fn(*args, **kwargs)` and were not there before.

    Args:
        fn: any function of CPU tensors; what it returns counts while it runs.

    Returns:
        Bytes. Views and tensors passed in count nothing.
    """
    mode = PeakBytes()
    with mode:
        fn(*args, **kwargs)
    return mode.peak


def allocated_peak(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes by which `fn(*args, **kwargs)` raises what torch's CPU allocator has handed out.

    As `torch.cuda.max_memory_allocated` on a GPU, less what was allocated before. From the events
    of torch's profiler (tried on torch 2.11, 2.13 and 2.15), so compile before: what compiling
    allocates counts too.

    Args:
        fn: any function; what it returns counts while it runs.

    Returns:
        Bytes.
    """
    forget_scratch()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        fn(*args, **kwargs)
    profiler: Any = run.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes), default=0)
