"""What deferred logits answer without their values.

Uses private APIs: `torch._guards` and `torch._C._functorch` (tried on torch 2.11, 2.13, 2.15).
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elmo_compile.deferred.gradient import backward, gradient
from elmo_compile.deferred.nodes import derive
from elmo_compile.deferred.origin import FAKES, fake
from elmo_compile.deferred.rows import order_of, parts_of
from elmo_compile.deferred.state import Root, State
from elmo_compile.deferred.step import Argument, Step, as_argument
from elmo_compile.deferred.tables import (
    AUTOCAST,
    CALLS_PYTHON,
    COMPARISONS,
    DETACHES,
    LOSSES,
    OTHER_VALUES,
    PARTS,
    PERMUTES,
    READS,
    ROWS,
    SCALES,
    SHARES,
    STAYS_DEFERRED,
    STORAGES,
    TOPS,
    WATCHES,
)
from elmo_compile.deferred.targets import made_by_program
from elmo_compile.deferred.tensor import Deferred
from elmo_compile.ops.data_parallel import inside
from elmo_compile.ops.kept import KEPT, Tops, collecting
from elmo_compile.ops.owners import owner_of
from elmo_compile.ops.unfused import read_elsewhere


def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of `func`, or NotImplemented where it is to run on the values."""
    if func in STORAGES and torch._guards.TracingContext.try_get() is not None:
        return NotImplemented  # Dynamo of torch 2.11 tells tensors apart by their storages.
    if func in READS:
        plain = pytree.tree_map_only(Deferred, Deferred.materialize, (args, kwargs))
        found = func(*plain[0], **plain[1])
        if func in SHARES:
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, Deferred):
                    value._state.overwrite()
        return found
    if func in CALLS_PYTHON and isinstance(args[0], Deferred) and not args[0].requires_grad:
        state = args[0]._state
        plain = pytree.tree_map_only(Deferred, Deferred.materialize, (args[1:], kwargs))
        func(state.real(), *plain[0], **plain[1])
        state.overwrite()
        return args[0]
    if func in DETACHES and args[0].ndim == 0 and args[0]._state.settled:
        return args[0]._state.real().detach()
    if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
        return args[0].take_data()
    if func is torch.autograd.grad:
        return gradient(*args, **kwargs)
    if func is torch.autograd.backward:
        return backward(*args, **kwargs)
    if func is torch.Tensor.backward:
        return backward(args[0], kwargs.pop("gradient"), **kwargs)
    if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
        args[0].replace_values(args[1])
        return None
    logits, rest, named, others = _logits_first(args, kwargs)
    # The tensors of torch.func live no longer than its transform.
    if logits is None or torch._C._functorch.peek_interpreter_stack() is not None:
        return NotImplemented
    state = logits._state
    if named.get("out") is not None:
        return NotImplemented
    if func in WATCHES:
        logits.watch(func.__name__)
    if not logits.untouched:
        return NotImplemented
    try:
        rest, named = pytree.tree_map(functools.partial(as_argument, func), (rest, named))
    except TypeError:
        return NotImplemented
    root, _ = state.recipe()
    if not isinstance(root, Root):
        pass  # A loss: no metric is taken of it.
    elif func in TOPS:
        return _top(logits, Step(func, rest, named))
    elif func in LOSSES or (func in ROWS and not (state.available or _fused(logits, root))):
        return _streamed(logits, Step(func, rest, named))
    if func in PARTS:
        return parts_of(func, logits, rest, named)
    step = _kept(func, logits, rest, named)
    made = None if step is None else derive(logits, step, others)
    return NotImplemented if made is None else made


def _kept(func: Any, logits: Deferred, rest: tuple[Any, ...], named: dict[str, Any]) -> Step | None:
    """The operation as a step; None if it cannot be one."""
    if func in PERMUTES:
        order = order_of(func, logits.ndim, rest, named)
        return None if order is None else Step(Tensor.permute, (order,), {})
    if func not in STAYS_DEFERRED or not _stays(func, rest, named, logits):
        return None
    root, _ = logits._state.recipe()
    if func in OTHER_VALUES and isinstance(root, Root) and not logits._state.available:
        root.check(may_wait=False)  # Where nothing could be read of the result, it is said here.
    rest = _with_tensor_scale(logits, rest) if func in SCALES else rest
    return Step(func, *_indexed(func, rest), named)


def _fused(logits: Deferred, root: Root) -> bool:
    """Whether a backward through these logits would update a weight."""
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return False
    tied = {id(weight) for weight in root.read_elsewhere}
    for value in root.inputs:
        owner = owner_of(value) if isinstance(value, torch.nn.Parameter) else None
        if owner is not None and (id(value) not in tied or owner.policy().at_step):
            return True
    return False


def _logits_first(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Deferred | None, tuple[Any, ...], dict[str, Any], list[Deferred]]:
    """The one deferred tensor that is not a program's to make, if it is the first argument; the
    other arguments; and the deferred tensors among these, if a program makes them."""
    if args:
        first, rest, named = args[0], args[1:], kwargs
    else:
        named = dict(kwargs)
        first, rest = named.pop("input", None), ()
    rest, named = pytree.tree_map(made_by_program, (rest, named))
    others = [other for other in pytree.tree_leaves((rest, named)) if isinstance(other, Deferred)]
    if not isinstance(first, Deferred):
        return None, (), {}, []
    if others:
        if not all(_of_same_logits(first, other) for other in others):
            return None, (), {}, []
        rest, named = pytree.tree_map_only(Deferred, _again, (rest, named))
    return first, rest, named, others


MOST_STEPS = 64
"""Of an argument that is made of the logits again: a value used twice is written twice."""


def _of_same_logits(first: Deferred, other: Deferred) -> bool:
    """Whether a program of the first can make the other, which takes no gradient: that of an
    operation goes to its first argument alone."""
    root, steps = other._state.recipe()
    if not isinstance(root, Root) or root is not first._state.recipe()[0]:
        return False
    if torch.is_grad_enabled() and (first.requires_grad or other.requires_grad):
        return False
    return other.untouched and sum(step.size for step in steps) <= MOST_STEPS


def _again(other: Deferred) -> Argument:
    return Argument(None, other._state.recipe()[1])


_SMALL = 8
"""A tensor that is copied has at most so many times fewer numbers than the logits, or one row."""


def _stays(func: Any, rest: tuple[Any, ...], named: dict[str, Any], logits: Deferred) -> bool:
    """Whether the other arguments leave the operation one on rows: no other device, no tensors but
    indices, numbers and what is small enough to be copied."""
    name = func.__name__
    given = pytree.tree_leaves((rest, named))
    tensors = [g for g in given if isinstance(g, Tensor)]
    grad = torch.is_grad_enabled() and func not in COMPARISONS
    if any(isinstance(g, Argument) and not g.of_logits for g in given) or any(
        t.requires_grad and grad for t in tensors
    ):
        return False
    if name == "to":
        devices = [torch.device(g) for g in given if isinstance(g, str | torch.device)]
        return not tensors and all(
            device.type == logits.device.type and device.index in (None, logits.device.index)
            for device in devices
        )
    if name == "type":
        return bool(given)
    if name == "__getitem__":
        return True
    most = max(logits.numel() // _SMALL, logits._state.outputs)
    return all(t.numel() == 1 or t.numel() <= most for t in tensors)


def _with_tensor_scale(logits: Deferred, rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """A float as a tensor that leaves the dtype of the result as it is."""
    dtype = logits.dtype
    if len(rest) != 1 or type(rest[0]) is not float or logits.ndim == 0:
        return rest
    if not dtype.is_floating_point:
        return rest
    wide = torch.promote_types(dtype, torch.float32)
    return (torch.full((), rest[0], dtype=wide, device=logits.device),)


def _indexed(func: Any, rest: tuple[Any, ...]) -> tuple[tuple[Any, ...]]:
    """Indices with masks as the positions they select, so that the shape is known."""
    if func.__name__ != "__getitem__":
        return (rest,)
    (index,) = rest
    parts = index if isinstance(index, tuple) else (index,)
    found: list[Any] = []
    for part in parts:
        if isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim > 0:
            found += part.nonzero(as_tuple=True)
        else:
            found.append(part)
    return ((tuple(found) if isinstance(index, tuple) or len(found) > 1 else found[0],),)


def _top(logits: Deferred, step: Step) -> Any:
    """argmax, topk or max of each row."""
    bound = _bound_top(step)
    if bound is None:
        return NotImplemented
    k, dim, keepdim = bound
    state = logits._state
    if state.available:
        return NotImplemented
    if dim not in (-1, logits.ndim - 1):
        permuted = any(step.func is Tensor.permute for step in state.recipe()[1])
        return _streamed(logits, step) if permuted else NotImplemented
    name = step.func.__name__
    root = _root(state)
    differentiable = name != "argmax" and logits.requires_grad and torch.is_grad_enabled()
    if root.stale or (k <= KEPT and not differentiable):
        found = state.top() if k <= KEPT else None
        if found is not None:
            return _answer(name, found, k, keepdim)
        root.check()
    return _streamed(logits, step)


def _root(state: State) -> Root:
    """The root of logits."""
    root, _ = state.recipe()
    assert isinstance(root, Root)
    return root


def _answer(name: str, found: tuple[Tensor, ...], k: int, keepdim: bool) -> Any:
    first, values, indices = found
    if name == "argmax":
        return first.clone().unsqueeze(-1) if keepdim else first.clone()
    if name == "topk":
        return torch.return_types.topk((values[..., :k].clone(), indices[..., :k].clone()))
    value, index = values[..., :1], first.unsqueeze(-1)
    if not keepdim:
        value, index = value.squeeze(-1), index.squeeze(-1)
    return torch.return_types.max((value.clone(), index.clone()))


def _bound_top(step: Step) -> tuple[int, int, bool] | None:
    """(k, dim, keepdim) of argmax, topk or max along one dimension; None for other forms."""
    args, kwargs = step.arguments()
    name = step.func.__name__
    if step.tensors:
        return None
    forms: dict[str, Callable[..., tuple[Any, ...]]] = {
        "argmax": lambda dim=None, keepdim=False: (1, dim, keepdim),
        "max": lambda dim=None, keepdim=False: (1, dim, keepdim),
        "topk": lambda k, dim=-1, largest=True, sorted=True: (k, dim if largest else None, False),
    }
    try:
        inspect.signature(forms[name]).bind(*args, **kwargs)
    except TypeError:
        return None
    k, dim, keepdim = forms[name](*args, **kwargs)
    return None if not isinstance(dim, int) else (int(k), dim, bool(keepdim))


def _streamed(logits: Deferred, step: Step) -> Any:
    """A loss or a metric of the logits, compiled together with the product that makes them."""
    state = logits._state
    if not _reduces(state, step) or (logits.requires_grad and not logits.attached):
        return NotImplemented
    root, (_, steps) = _root(state), state.recipe()
    if root.stale and state.available:
        return NotImplemented
    device = state.fake.device.type
    if any(s.func in AUTOCAST and not s.in_mode(device) for s in steps):
        return NotImplemented  # The program runs in one mode, that of now.
    grad = torch.is_grad_enabled() and logits.requires_grad
    root.check(may_wait=not grad)
    steps = [*steps, step]
    tensors = [tensor for s in steps for tensor in s.tensors]
    with torch.set_grad_enabled(grad or any(tensor.requires_grad for tensor in tensors)):
        inputs = root.inputs if grad else [_detached(value) for value in root.inputs]
        with (
            _collecting(root, state, step) as tops,
            inside(root.data_parallel),
            read_elsewhere(root.read_elsewhere),
        ):
            result = root.origin.program(steps)(*inputs, *tensors)
    passes = [found for at_weight in tops.values() for found in at_weight]
    if len(passes) == 1:
        root.collect(passes[0])
    if grad:
        _remember(logits, step, result)
    return result


def _remember(logits: Deferred, step: Step, result: Any) -> None:
    """Note what a gradient may be asked of: a loss, or parts of what `step` returned."""
    if isinstance(result, Tensor):
        found = [(result, [step])]
    else:
        found = [(p, [step, Step(operator.getitem, (i,), {})]) for i, p in enumerate(result)]
    for part, steps in found:
        if part.requires_grad:
            logits.remember(part, *steps)


def _collecting(root: Root, state: State, step: Step) -> AbstractContextManager[Tops]:
    """Around a loss of the logits as they are: its pass may collect what outlives an update."""
    same = state is root and step.func in LOSSES and root.origin.bare_product
    if not (same and root.large and root.fake.dtype == torch.float32):
        return nullcontext({})
    return collecting(value for value in root.inputs if isinstance(value, torch.nn.Parameter))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _reduces(state: State, step: Step) -> bool:
    """Whether the result has lost the outputs."""
    try:
        with FAKES, torch.no_grad():
            given = [fake(tensor) for tensor in step.tensors]
            made = step(state.fake, given, _root(state).fake)
    except Exception:  # Whatever it is, the operation itself raises it better.
        return False
    outputs = state.outputs
    return all(
        isinstance(part, Tensor)
        and part.numel() < state.fake.numel()
        and (outputs not in part.shape or step.func in LOSSES)
        for part in pytree.tree_leaves(made)
    )
