"""Element-wise pieces as vector code: compiled by Inductor at first use, eager for small problems.

A piece is a plain function of tensors, numbers and None; the same source runs eagerly and
compiled. Each distinct use (which arguments are None, which dtypes, which flags) is compiled once,
with every size symbolic, so that neither N, L, D, a ragged last chunk, a learning rate nor a step
compiles again. Private APIs: `torch._dynamo`, `torch._C`; tried on torch 2.11,
2.13 and 2.15.
"""

from __future__ import annotations

import functools
import struct
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from elmo_compile.kernels.aten.direct import by_inductor, form_of, recorded
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
_FORMS = 256
"""Forms of arguments that a piece keeps in mind: sizes of chunks, batches and parameters."""
_lock = threading.RLock()
_cache: dict[Any, _Variant | None] = {}
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
    if not use_compiled:
        return functools.partial(fn, **flags)
    return _piece(fn, vectors, tuple(sorted(flags.items())))


@functools.lru_cache(maxsize=1024)
def _piece(fn: Callable[..., Any], vectors: bool, flags: tuple[tuple[str, Any], ...]) -> _Piece:
    """The one piece of a function and its flags."""
    eager = functools.partial(fn, **dict(flags))
    name = (fn, vectors, flags)
    return _Piece(name, eager, lambda args: _variant(*name, args), packs=True)


class _Piece:
    """A function that is compiled once for each kind of arguments, at its first call with them."""

    def __init__(
        self,
        name: tuple[Any, ...],
        eager: _Run,
        compile_for: Callable[[tuple[Any, ...]], _Variant],
        *,
        packs: bool,
    ) -> None:
        """packs: whether its numbers travel in a tensor, so that code does not depend on them."""
        self._name, self._eager, self._compile_for = name, eager, compile_for
        self._packs = packs
        self._known: dict[tuple[Any, ...], _Run] = {}
        """Form of arguments -> what runs the code compiled for them, and nothing else."""

    def __call__(self, *args: Any) -> Any:
        if _get_current_dispatch_mode() is not None:  # FlopCounterMode: Dynamo refuses under one
            return self._eager(*args)
        form = form_of(args, packed=self._packs)
        known = self._known.get(form)
        if known is None:
            return self._first(form, args)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return known(*args)

    def _first(self, form: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        """A call by way of Dynamo, which is not needed for this form afterwards.

        No argument is a view for it: it guards on the sizes of what one is a view of.
        """
        tensors = [a for a in args if isinstance(a, Tensor)]
        # A ragged last chunk of one output is not worth a variant of its own.
        if tensors[0].shape[:1] == (1,) or any(t.numel() == 0 for t in tensors):
            return self._eager(*args)
        variant = _compiled_once(
            (*self._name, tuple(_kind(a) for a in args)), lambda: self._compile_for(args)
        )
        if variant is None:
            return self._eager(*args)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            args = tuple(torch.ops.aten.alias(a) if isinstance(a, Tensor) else a for a in args)
            result, direct = recorded(variant.run, variant.arguments(args))
        if direct is not None:
            if len(self._known) >= _FORMS:
                self._known.clear()
            arguments = variant.arguments
            self._known[form] = lambda *args: direct(*arguments(args))
        return result


class _Variant(NamedTuple):
    """A function compiled, and what it takes of the arguments of a piece."""

    run: _Run
    arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]]


def _variant(
    fn: Callable[..., Any],
    vectors: bool,
    flags: tuple[tuple[str, Any], ...],
    args: tuple[Any, ...],
) -> _Variant:
    """A function compiled; its numbers travel in one float64 tensor.

    As Python floats they would be symbols, and so would every float constant of the source that
    Dynamo reads (a format's largest value): what it then cannot keep as a symbol makes it start
    again, which took a quarter of the fp8 update's time. With `specialize_float` the source's
    constants are constants, and the elements of a tensor are data.
    """
    numbers = tuple(isinstance(a, float) for a in args)
    named = dict(flags)

    def unpacked(packed: Tensor, *others: Any) -> Any:
        scalars, rest = iter(packed.unbind()), iter(others)
        return fn(*[next(scalars) if number else next(rest) for number in numbers], **named)

    if any(numbers):
        variant = _Variant(_constant_floats(_own_code(unpacked, {})), _packing(numbers))
    else:
        variant = _Variant(_constant_floats(_own_code(fn, named)), lambda values: values)
    taken = variant.arguments(args)
    packed = taken[: any(numbers)]
    copies = _copies(taken[len(packed) :], torch._dynamo.mark_dynamic, vectors)
    variant.run(*packed, *copies)
    return variant


def _constant_floats(fn: Callable[..., Any]) -> _Run:
    """As `_compiler`; the floats in the source of `fn` are constants whenever Dynamo compiles it:
    a guard may ask for that at a later call too."""
    run = _compiler(fn)

    def specialized(*args: Any) -> Any:
        with torch._dynamo.config.patch(specialize_float=True):
            return run(*args)

    return specialized


def _packing(numbers: tuple[bool, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Arguments, some of them numbers -> all numbers as one tensor, then the others."""
    those = [i for i, number in enumerate(numbers) if number]
    others = [i for i, number in enumerate(numbers) if not number]
    pack = struct.Struct(f"{len(those)}d").pack

    def packed(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return _packed(pack(*[values[i] for i in those])), *[values[i] for i in others]

    return packed


@functools.lru_cache(maxsize=256)
def _packed(numbers: bytes) -> Tensor:
    """float64 numbers as a tensor that is only read: those of a step are the same in each chunk."""
    with torch.inference_mode(False):
        return torch.frombuffer(bytearray(numbers), dtype=torch.float64)


def graph_piece(module: fx.GraphModule, use_compiled: bool) -> Callable[..., Any]:
    """A graph as a piece, returning a tuple; compiled once for each kind of arguments.

    Sizes that the graph holds as constants (rows of a static batch) stay constants in the code.
    """
    return _graph_piece(module) if use_compiled else module


@functools.lru_cache(maxsize=1024)
def _graph_piece(module: fx.GraphModule) -> _Piece:
    """The one piece of a graph."""

    def variant(args: tuple[Any, ...]) -> _Variant:
        run = functools.partial(_compiler(_own_code(type(module).forward, {})), module)
        run(*_copies(args, torch._dynamo.maybe_mark_dynamic))
        return _Variant(run, lambda values: values)

    return _Piece((module,), module, variant, packs=False)


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
    made = by_inductor(fn, _INDUCTOR)

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return made(*args)

    return run


def _compiled_once(key: Any, compile_now: Callable[[], _Variant]) -> _Variant | None:
    """What `compile_now` returns, kept under `key`; None, and said, if that fails."""
    with _lock:
        if key in _cache:
            return _cache[key]
        variant: _Variant | None = None
        try:
            with values_traced_once():
                variant = compile_now()
        except Exception as error:  # whatever a compiler or its absence raises
            _tell(_cause(error))
        _cache[key] = variant
        return variant


def _cause(error: Exception) -> str:
    """In one line, what went wrong in a compiler; Dynamo wraps it and says only that in its first
    line."""
    inner = getattr(error, "inner_exception", error)
    (first, *_) = str(inner).strip().splitlines() or [""]
    return f"{type(inner).__name__}: {first}"


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
            a = _copy(a)
            for dim, size in enumerate(a.shape):
                if vectors and 0 < dim == a.ndim - 1:
                    torch._dynamo.mark_static(a, dim)
                elif size > 1:
                    mark(a, dim)
        copies.append(a)
    return copies


def _copy(a: Tensor) -> Tensor:
    """A copy; of a part of a wider tensor (a chunk of dense targets) one whose parts are apart too:
    a stride that is a size by chance would be taken to be it by meaning."""
    inner, *outer = sorted(range(a.ndim), key=a.stride) or [-1]
    if not outer or a.stride(inner) != 1 or a.stride(outer[0]) <= a.shape[inner]:
        return a.detach().clone()
    order = [*reversed(outer), inner]
    sizes = [a.shape[dim] for dim in order]
    with torch._C._AutoDispatchBelowADInplaceOrView():  # not a view for Dynamo, as no argument is
        wider = a.new_empty((*sizes[:-1], sizes[-1] + 1))[..., :-1]
        return wider.permute(*[order.index(dim) for dim in range(a.ndim)]).copy_(a)


def reset() -> None:
    """Forget compiled pieces and failures to compile (for tests)."""
    with _lock:
        _cache.clear()
        _told.clear()
        _piece.cache_clear()
        _graph_piece.cache_clear()
