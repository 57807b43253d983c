"""One operation on deferred logits, remembered instead of run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree


class Argument:
    """A tensor argument that a program makes by steps: of a given tensor, or of the logits.

    Args:
        source: what the first step is applied to; None for what the whole program's first is.
        steps: one at least, for a given tensor.
    """

    def __init__(self, source: Tensor | None, steps: Sequence[Step]) -> None:
        self.of_logits = source is None
        self._steps = steps
        given = [] if source is None else [source]
        self.tensors = [*given, *(tensor for step in steps for tensor in step.tensors)]
        self.key = self.of_logits, *(step.key for step in steps)

    @property
    def size(self) -> int:
        """Operations."""
        return sum(step.size for step in self._steps)

    def __call__(self, tensors: Sequence[Any], root: Any = None) -> Any:
        """The argument, made of these in place of its own tensors, or of `root`."""
        return self._apply(tensors, root, Step.__call__)

    def emit(self, graph: fx.Graph, tensors: Sequence[fx.Node], root: fx.Node) -> fx.Node:
        """The same as a node."""
        node: fx.Node = self._apply(tensors, root, functools.partial(_emit, graph))
        return node

    def _apply(self, tensors: Sequence[Any], root: Any, apply: Callable[..., Any]) -> Any:
        left = iter(tensors)
        made = root if self.of_logits else next(left)
        for step in self._steps:
            made = apply(step, made, list(itertools.islice(left, len(step.tensors))), root)
        return made


def _emit(graph: fx.Graph, step: Step, *values: Any) -> fx.Node:
    return step.emit(graph, *values)


class Step:
    """`func(logits, *args, **kwargs)`; tensors among the arguments are kept apart from the rest.

    It runs in the autocast mode that it was taken in, whenever that is.
    """

    def __init__(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]):
        leaves, self._spec = pytree.tree_flatten((tuple(args), kwargs))
        self.func = func
        self._leaves = [_GIVEN if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [tensor for leaf in leaves for tensor in _tensors(leaf)]
        self.key = (func, self._spec, tuple(map(_hashable, self._leaves)))
        self._modes = {device: _autocast(device) for device in _DEVICES}

    def frozen(self) -> Step:
        """The same with copies of its tensors, to be run later."""
        copy = Step(self.func, (), {})
        copy.__dict__.update(self.__dict__)
        copy.tensors = [tensor.detach().clone() for tensor in self.tensors]
        return copy

    def takes_rows(self, ndim: int) -> bool:
        """Whether this takes or orders rows of a tensor of `ndim` dimensions, and leaves the last
        dimension, the outputs, as it is."""
        if self.func.__name__ not in _BY_ROWS:
            return False
        args, kwargs = self.arguments()
        first = args[0] if args else kwargs.get("dim")
        if self.func.__name__ == "__getitem__":
            return _indexes_rows(first, ndim)
        if isinstance(first, int):
            return first % ndim != ndim - 1
        return isinstance(first, tuple) and first[-1] % ndim == ndim - 1

    @property
    def size(self) -> int:
        """Operations, its arguments' included."""
        return 1 + sum(leaf.size for leaf in self._leaves if isinstance(leaf, Argument))

    @property
    def reads_logits(self) -> bool:
        """Whether an argument beside the first is made of the logits, too."""
        return any(isinstance(leaf, Argument) and leaf.of_logits for leaf in self._leaves)

    def __call__(self, z: Any, tensors: Sequence[Any] | None = None, root: Any = None) -> Any:
        """Run it.

        Args:
            z: what it is a step of.
            tensors: in place of its own.
            root: the logits that the first step was applied to, for a step that `reads_logits`.
        """
        args, kwargs = self.arguments(tensors, lambda made, own: made(own, root))
        if not isinstance(z, Tensor) or self.in_mode(z.device.type):
            return self.func(z, *args, **kwargs)
        enabled, dtype = self._modes[z.device.type]
        with torch.autocast(z.device.type, dtype=dtype, enabled=enabled):
            return self.func(z, *args, **kwargs)

    def in_mode(self, device: str) -> bool:
        """Whether the autocast mode of this kind of device is now what it was then."""
        return device not in self._modes or self._modes[device] == _autocast(device)

    def emit(
        self, graph: fx.Graph, z: fx.Node, tensors: Sequence[fx.Node], root: fx.Node
    ) -> fx.Node:
        """The same as a node."""
        args, kwargs = self.arguments(tensors, lambda made, own: made.emit(graph, own, root))
        name = getattr(self.func, "__name__", "")
        for method in (name, f"__{name}__"):
            if getattr(torch.Tensor, method, None) is self.func:
                return graph.call_method(method, (z, *args), kwargs)
        return graph.call_function(self.func, (z, *args), kwargs)

    def arguments(
        self, tensors: Sequence[Any] | None = None, make: Callable[..., Any] = Argument.__call__
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What stands behind the logits.

        Args:
            tensors: in place of its own.
            make: of an argument that is made, and of what stands for its tensors.
        """
        left = iter(self.tensors if tensors is None else tensors)
        leaves = []
        for leaf in self._leaves:
            if leaf is _GIVEN:
                leaves.append(next(left))
            elif isinstance(leaf, Argument):
                leaves.append(make(leaf, list(itertools.islice(left, len(leaf.tensors)))))
            else:
                leaves.append(leaf)
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs


_BY_ROWS = ("__getitem__", "narrow", "select", "index_select", "permute")


def _indexes_rows(index: Any, ndim: int) -> bool:
    parts = [p for p in (index if isinstance(index, tuple) else (index,)) if p is not None]
    last_is_named = len(parts) == ndim or any(part is Ellipsis for part in parts)
    if not last_is_named or parts[-1] is Ellipsis:
        return True
    return isinstance(parts[-1], slice) and parts[-1] == slice(None)


_DEVICES = ("cpu", "cuda")


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    """Whether autocast is on, and to which dtype (one for all where it is off)."""
    enabled = torch.is_autocast_enabled(device)
    return enabled, torch.get_autocast_dtype(device) if enabled else torch.bfloat16


_GIVEN = object()
"""Stands where a tensor is given."""


def _tensors(leaf: Any) -> Sequence[Tensor]:
    """Those that an argument needs."""
    if isinstance(leaf, Argument):
        return leaf.tensors
    return [leaf] if isinstance(leaf, Tensor) else []


def as_argument(func: Callable[..., Any], argument: Any) -> Any:
    """An argument as a program can be written with it: numpy's numbers as Python's, its arrays as
    tensors where they are indices. Raises TypeError for what programs are not told apart by."""
    if isinstance(argument, slice):
        ends = argument.start, argument.stop, argument.step
        if any(isinstance(end, Tensor) for end in ends):
            raise TypeError("a tensor in a slice")
        return slice(*(as_argument(func, end) for end in ends))
    if isinstance(argument, np.generic):
        return argument.item()
    if isinstance(argument, np.ndarray) and func is Tensor.__getitem__:
        return torch.as_tensor(argument)
    if not isinstance(argument, Tensor):
        hash(argument)
    return argument


def _hashable(value: Any) -> Any:
    if isinstance(value, Argument):
        return value.key
    if isinstance(value, slice):
        return slice, *map(_hashable, (value.start, value.stop, value.step))
    # 1, 1.0 and True are equal keys but different arguments.
    return type(value), value
