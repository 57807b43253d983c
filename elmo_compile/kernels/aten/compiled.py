"""Element-wise pieces as vector code: compiled by Inductor at first use, eager for small problems.

A piece is a plain function of tensors, numbers and None; the same source runs eagerly and
compiled. Each distinct use (which arguments are None, which dtypes, which flags) is compiled once,
with every size symbolic, so that neither N, L, D, a ragged last chunk, a learning rate nor a step
compiles again. Private APIs: `torch._dynamo`, `torch._C`; tried on torch 2.13.
"""

from __future__ import annotations

import functools
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from elmo_compile.kernels.aten.traced_once import values_traced_once

SMALL = 1 << 20
"""Below this many logits a problem runs eagerly: compiling takes seconds, once."""
SMALL_WEIGHT = 1 << 22
"""Elements of a weight whose decoding and update are compiled, however few its logits are."""

_INDUCTOR: dict[str, str | int | bool | Callable[..., Any]] = {
    # One kernel a piece: by default a long chain of integer operations is cut into several, with
    # buffers between them (the fp8 update: 0.70 of a product instead of 1.0).
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
    "realize_acc_reads_threshold": 1 << 20,
}
_Run = Callable[..., Any]
_lock = threading.RLock()
_cache: dict[Any, _Run] = {}
_told: set[str] = set()


def piece(
    fn: Callable[..., Any], use_compiled: bool, *, vectors: bool = False, **flags: Any
) -> Callable[..., Any]:
    """`fn` with its flags bound, compiled if asked for.

    Args:
        fn: function of tensors, floats and None; its keyword-only flags are Python constants.
        use_compiled: whether the problem is large enough to be worth a compiler.
        vectors: the last size of tensors of two or more dimensions is a constant of the code.
        flags: hashable constants, part of what is compiled.

    Returns:
        A function of the positional arguments of `fn`.
    """
    eager = functools.partial(fn, **flags)
    if not use_compiled:
        return eager

    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        # A ragged last chunk of one output is not worth a variant of its own.
        if tensors[0].shape[:1] == (1,) or any(t.numel() == 0 for t in tensors):
            return eager(*args)
        if _get_current_dispatch_mode() is not None:  # FlopCounterMode: Dynamo refuses under one
            return eager(*args)
        key = (fn, vectors, tuple(sorted(flags.items())), tuple(_kind(a) for a in args))
        run = _cache.get(key)
        if run is None:
            run = _compiled_once(key, eager, lambda: _piece_of(fn, vectors, flags, args))
        return run(*args)

    return call


def _piece_of(
    fn: Callable[..., Any], vectors: bool, flags: dict[str, Any], args: tuple[Any, ...]
) -> _Run:
    """A function compiled; its numbers travel in one float64 tensor.

    As Python floats they would be symbols, and so would every float constant of the source that
    Dynamo reads (a format's largest value): what it then cannot keep as a symbol makes it start
    again, which took a quarter of the fp8 update's time. With `specialize_float` the source's
    constants are constants, and the elements of a tensor are data.
    """
    numbers = tuple(isinstance(a, float) for a in args)

    def unpacked(packed: Tensor, *others: Any) -> Any:
        scalars, rest = iter(packed.unbind()), iter(others)
        return fn(*[next(scalars) if number else next(rest) for number in numbers], **flags)

    def pack(values: tuple[Any, ...]) -> tuple[Any, ...]:
        packed = torch.tensor([a for a in values if isinstance(a, float)], dtype=torch.float64)
        return packed, *(a for a in values if not isinstance(a, float))

    if not any(numbers):
        compiled = _compiler(_own_code(fn, flags))
        with torch._dynamo.config.patch(specialize_float=True):
            compiled(*_copies(args, torch._dynamo.mark_dynamic, vectors))
        return compiled
    compiled = _compiler(_own_code(unpacked, {}))
    packed, *others = pack(args)
    with torch._dynamo.config.patch(specialize_float=True):
        compiled(packed, *_copies(tuple(others), torch._dynamo.mark_dynamic, vectors))
    return lambda *values: compiled(*pack(values))


def graph_piece(module: fx.GraphModule, use_compiled: bool) -> Callable[..., Any]:
    """A graph as a piece, returning a tuple; compiled once for each kind of arguments.

    Sizes that the graph holds as constants (rows of a static batch) stay constants in the code.
    """
    if not use_compiled:
        return module
    forward = type(module).forward

    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if any(t.numel() == 0 for t in tensors) or _get_current_dispatch_mode() is not None:
            return module(*args)
        key = (module, tuple(_kind(a) for a in args))
        run = _cache.get(key)
        if run is None:

            def compiled() -> _Run:
                made = _compiler(_own_code(forward, {}))
                made(module, *_copies(args, torch._dynamo.maybe_mark_dynamic))
                return functools.partial(made, module)

            run = _compiled_once(key, module, compiled)
        return run(*args)

    return call


def _kind(value: Any) -> Any:
    """What a compiled piece depends on in one argument: not its sizes, not a number's value."""
    if isinstance(value, Tensor):
        # A size of 1 is compiled as a constant, as is a vector's bias as a column.
        ones = tuple(size == 1 for size in value.shape)
        return value.dtype, ones, value.is_contiguous()
    return type(value)


def _compiler(fn: Callable[..., Any]) -> _Run:
    """`fn` to be compiled at its first call, which it and later ones make below autograd.

    Nothing records gradients here, and Dynamo guards on the dispatch keys that are left: a first
    call inside an op and the calls after it, or an optimizer's, would be two variants.
    """
    compiled = torch.compile(fn, dynamic=True, fullgraph=True, options=_INDUCTOR)

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return compiled(*args)

    return run


def _compiled_once(key: Any, eager: _Run, compile_now: Callable[[], _Run]) -> _Run:
    """What `compile_now` returns, kept under `key`; eager, and said, if that fails."""
    with _lock:
        if key in _cache:
            return _cache[key]
        try:
            with values_traced_once():
                run = compile_now()
        except Exception as error:  # whatever a compiler or its absence raises
            _tell(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            run = eager
        _cache[key] = run
        return run


def _tell(cause: str) -> None:
    """Warn about a failure to compile, each cause once."""
    if cause in _told:
        return
    _told.add(cause)
    warnings.warn(
        "elmo_compile: Inductor could not compile a CPU kernel, which runs with eager operations "
        f"from now on (right, but slower). The cause: {cause}",
        RuntimeWarning,
        stacklevel=4,
    )


def _own_code(fn: Callable[..., Any], flags: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function with a code object of its own and its flags bound as defaults.

    Dynamo counts recompilations by code object: variants of one piece would use up one limit.
    """
    assert isinstance(fn, types.FunctionType)
    copy = types.FunctionType(
        fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
    )
    copy.__kwdefaults__ = {**(fn.__kwdefaults__ or {}), **flags}
    return copy


def _copies(
    args: tuple[Any, ...], mark: Callable[[Tensor, int], None], vectors: bool = False
) -> list[Any]:
    """Arguments to compile with: nothing of the caller is written, and no two sizes that are equal
    by chance are taken to be equal by meaning."""
    copies = []
    for a in args:
        if isinstance(a, Tensor):
            a = a.detach().clone()
            for dim, size in enumerate(a.shape):
                if vectors and 0 < dim == a.ndim - 1:
                    torch._dynamo.mark_static(a, dim)
                elif size > 1:
                    mark(a, dim)
        copies.append(a)
    return copies


def reset() -> None:
    """Forget compiled pieces and failures to compile (for tests)."""
    with _lock:
        _cache.clear()
        _told.clear()
        _failure = None
