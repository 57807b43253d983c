"""Inductor traces each value of a piece once, however often it is read.

Inductor inlines: whatever reads a value that is not kept in a buffer traces its whole expression
anew, and uses of uses multiply. An AdamW update with Kahan compensation came to 99 000 operations
where it has 3000, only for common subexpressions to be found again at the end: 38 s instead of 19.
The generated code is the same to the byte (benchmarks/NOTES.md). Private API:
`torch._inductor.ir.Pointwise.make_loader`; tried on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def values_traced_once() -> Iterator[None]:
    """Compile with this open. To be opened by one thread at a time; what other threads compile
    meanwhile is compiled as ever."""
    from torch._inductor import ir  # takes seconds, and small problems compile nothing

    original = ir.Pointwise.make_loader

    def make_loader(self: Any) -> Callable[..., Any]:
        return _once(original(self))

    ir.Pointwise.make_loader = make_loader  # type: ignore[method-assign]
    try:
        yield
    finally:
        ir.Pointwise.make_loader = original  # type: ignore[method-assign]


def _once(load: Callable[..., Any]) -> Callable[..., Any]:
    """A loader that keeps what it returned in the trace at hand: a handler of operations is made
    for each, and for each masked part of one."""
    from torch._inductor.virtualized import V

    handler: Any = None
    found: dict[Any, Any] = {}

    def loader(index: Any) -> Any:
        nonlocal handler, found
        current = V.get_ops_handler()
        if current is not handler:
            handler, found = current, {}
        key = tuple(index)
        if key not in found:
            found[key] = load(index)
        return found[key]

    return loader
