"""One operation on deferred logits, remembered instead of run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree


class Step:
    """`func(logits, *args, **kwargs)`; tensors among the arguments are kept apart from the rest."""

    def __init__(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]):
        leaves, self._spec = pytree.tree_flatten((tuple(args), kwargs))
        self.func = func
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._given = [isinstance(leaf, Tensor) for leaf in leaves]
        self.key = (func, self._spec, tuple(self._given), tuple(map(_hashable, self._rest)))

    def frozen(self) -> Step:
        """The same with copies of its tensors, to be run later."""
        copy = Step(self.func, (), {})
        copy.__dict__.update(self.__dict__)
        copy.tensors = [tensor.detach().clone() for tensor in self.tensors]
        return copy

    def indexes_rows(self, ndim: int) -> bool:
        """Whether an index into a tensor of `ndim` dimensions leaves the last one whole."""
        (index,), _ = self.arguments()
        parts = [p for p in (index if isinstance(index, tuple) else (index,)) if p is not None]
        last_is_named = len(parts) == ndim or any(part is Ellipsis for part in parts)
        if not last_is_named or parts[-1] is Ellipsis:
            return True
        return isinstance(parts[-1], slice) and parts[-1] == slice(None)

    def __call__(self, z: Any, tensors: Sequence[Any] | None = None) -> Any:
        """Run it; with other tensors in place of its own, if given."""
        args, kwargs = self.arguments(tensors)
        return self.func(z, *args, **kwargs)

    def emit(self, graph: fx.Graph, z: fx.Node, tensors: Sequence[fx.Node]) -> fx.Node:
        """The same as a node."""
        args, kwargs = self.arguments(tensors)
        name = getattr(self.func, "__name__", "")
        if getattr(torch.Tensor, name, None) is self.func:
            return graph.call_method(name, (z, *args), kwargs)
        return graph.call_function(self.func, (z, *args), kwargs)

    def arguments(
        self, tensors: Sequence[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What stands behind the logits, with other tensors in place of its own, if given."""
        left = iter(self.tensors if tensors is None else tensors)
        leaves = [next(left) if given else rest for given, rest in zip(self._given, self._rest)]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs


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
    if isinstance(value, slice):
        return slice, *map(_hashable, (value.start, value.stop, value.step))
    # 1, 1.0 and True are equal keys but different arguments.
    return type(value), value
