"""Compiled code called without Dynamo, for arguments of a form that Dynamo has seen.

At every call Dynamo checks what its code depends on. That takes 60 us in a loop of nothing else,
and 500 us behind a matrix product, which leaves none of it in the caches (benchmarks/NOTES.md). A
piece depends on nothing but the form of its arguments, so what Dynamo chose for a form once is
right for it again. Private API: `torch._inductor.compile_fx`; tried on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Any]
_Sources = list[tuple[int | None, Any]]
"""Of each value: its position among others, or None and the value itself."""


class _Seen(threading.local):
    """What the code that Dynamo calls in this thread has to know, and leaves behind."""

    shares_memory = False
    """Whether arguments of the call at hand do: code compiled for them is for them alone."""
    call: tuple[Run, tuple[Any, ...], Any] | None = None
    """The code that ran, its arguments and what it returned."""


_seen = _Seen()


def by_inductor(fn: Run, options: dict[str, Any]) -> Run:
    """`fn` for `torch.compile`, with every size symbolic and these options of Inductor's."""

    def inductor(graph: Any, inputs: list[Any]) -> Run:
        from torch._inductor.compile_fx import compile_fx

        code: Any = compile_fx(graph, inputs, config_patches=options)
        for_any = not _seen.shares_memory

        def run(*args: Any) -> Any:
            made = code(*args)
            if for_any:
                _seen.call = code, args, made
            return made

        return run

    return torch.compile(fn, dynamic=True, fullgraph=True, backend=inductor)


def form_of(args: tuple[Any, ...], *, packed: bool) -> tuple[Any, ...]:
    """All that compiled code may depend on in a call; not the floats where they are `packed` in a
    tensor."""
    return (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        *[
            (type(a), a.dtype, a.shape, a.stride(), a.device)
            if isinstance(a, Tensor)
            else type(a) if packed and isinstance(a, float) else a
            for a in args
        ],
    )  # fmt: skip


def recorded(run: Run, args: tuple[Any, ...]) -> tuple[Any, Run | None]:
    """What `run`, made by `by_inductor`, returns; and a function that does the same for arguments
    of the same form, or None where that is not known to be right."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    memory = {t.untyped_storage().data_ptr() for t in tensors}
    _seen.shares_memory, _seen.call = len(memory) < len(tensors), None
    try:
        result = run(*args)
        call = _seen.call
    finally:
        _seen.shares_memory, _seen.call = False, None
    if call is None or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return result, None
    code, given, made = call
    given_from = _sources(given, args, constants=True)
    values = list(result) if isinstance(result, tuple | list) else [result]
    result_from = _sources(values, made, constants=False)
    if given_from is None or result_from is None:
        return result, None
    kind = type(result) if isinstance(result, tuple | list) else None

    def direct(*args: Any) -> Any:
        made = code(*[value if at is None else args[at] for at, value in given_from])
        if kind is None:
            ((at, _),) = result_from
            return None if at is None else made[at]
        return kind([None if at is None else made[at] for at, _ in result_from])

    return result, direct


def _sources(values: Any, known: Any, *, constants: bool) -> _Sources | None:
    """Where each value stands among known ones; None where one is nowhere."""
    places = {id(k): i for i, k in enumerate(known) if isinstance(k, Tensor)}
    found: _Sources = []
    for value in values:
        if isinstance(value, Tensor):
            if id(value) not in places:
                return None
            found.append((places[id(value)], None))
        elif value is None or (constants and isinstance(value, int)):
            found.append((None, value))
        else:
            return None
    return found
