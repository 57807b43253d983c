"""Element-wise pieces as vector code: compiled by Inductor at first use, eager for small problems.

A piece is a plain function of tensors, numbers and None; the same source runs eagerly and
compiled. Each distinct use (which arguments are None, which dtypes, which flags) is compiled once,
with every size symbolic, so that neither N, L, D, a ragged last chunk, a learning rate nor a step
compiles again. Tried on torch 2.13.
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

SMALL = 1 << 20
"""Below this many logits a problem runs eagerly: compiling takes seconds, once."""

_INDUCTOR: dict[str, str | int | bool | Callable[..., Any]] = {
    # One kernel a piece: by default a long chain of integer operations is cut into several, with
    # buffers between them (the fp8 update: 0.70 of a product instead of 1.0).
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
    "realize_acc_reads_threshold": 1 << 20,
}
_lock = threading.RLock()
_cache: dict[Any, Callable[..., Any]] = {}
_told: set[str] = set()


def piece(fn: Callable[..., Any], use_compiled: bool, **flags: Any) -> Callable[..., Any]:
    """`fn` with its flags bound, compiled if asked for.

    Args:
        fn: function of tensors, floats and None; its keyword-only flags are Python constants.
        use_compiled: whether the problem is large enough to be worth a compiler.
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
        key = (fn, tuple(sorted(flags.items())), tuple(_kind(a) for a in args))
        run = _cache.get(key) or _compile(key, fn, flags, args, torch._dynamo.mark_dynamic)
        return run(*args)

    return call


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
        run = _cache.get(key) or _compile(
            key, forward, {}, (module, *args), torch._dynamo.maybe_mark_dynamic
        )
        return run(module, *args)

    return call


def _kind(value: Any) -> Any:
    """What a compiled piece depends on in one argument: not its sizes, not a number's value."""
    if isinstance(value, Tensor):
        # A size of 1 is compiled as a constant, as is a vector's bias as a column.
        ones = tuple(size == 1 for size in value.shape)
        return value.dtype, ones, value.is_contiguous()
    return type(value)


def _compile(
    key: Any,
    fn: Callable[..., Any],
    flags: dict[str, Any],
    args: tuple[Any, ...],
    mark: Callable[[Tensor, int], None],
) -> Callable[..., Any]:
    """Compile a piece on copies of its first arguments; eager, and said, if that fails."""
    with _lock:
        if key in _cache:
            return _cache[key]
        try:
            run = torch.compile(
                _own_code(fn, flags), dynamic=True, fullgraph=True, options=_INDUCTOR
            )
            run(*_copies(args, mark))
        except Exception as error:  # whatever a compiler or its absence raises
            _tell(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            run = functools.partial(fn, **flags)
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


def _copies(args: tuple[Any, ...], mark: Callable[[Tensor, int], None]) -> list[Any]:
    """Arguments to compile with: nothing of the caller is written, and no two sizes that are equal
    by chance are taken to be equal by meaning."""
    copies = []
    for a in args:
        if isinstance(a, Tensor):
            a = a.detach().clone()
            for dim, size in enumerate(a.shape):
                if size > 1:
                    mark(a, dim)
        copies.append(a)
    return copies


def reset() -> None:
    """Forget compiled pieces and failures to compile (for tests)."""
    with _lock:
        _cache.clear()
        _told.clear()
        _failure = None
