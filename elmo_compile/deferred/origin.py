"""Where deferred logits come from: one compiled graph's recipe, shared by all its calls."""

from __future__ import annotations

import dataclasses
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from elmo_compile.config import Options
from elmo_compile.deferred.made import Made
from elmo_compile.deferred.step import Step
from elmo_compile.passes.defer import bare_product
from elmo_compile.passes.graphs import tensor_of
from elmo_compile.passes.records import DeferredOutput

WHOLE = 64 * 2**20
"""Bytes of logits that are kept whole when the weight changes, where no memory budget is given."""


PROGRAMS, SHAPES = 64, 1024
"""Compiled losses and metrics, and shapes of logits, that one recipe remembers."""

T = TypeVar("T")


class Recent(Generic[T]):
    """What was made for the keys that were asked for last."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._found: OrderedDict[Any, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get_or(self, key: Any, make: Callable[[], T]) -> T:
        """What was made for `key`, made now if it was not or was forgotten."""
        found = self._found.pop(key, None)
        if found is None:
            found = make()
        self._found[key] = found
        while len(self._found) > self.limit:
            self._found.popitem(last=False)
        return found


class Origin:
    """The recipe of one result of a compiled graph, and what was compiled from it.

    Args:
        output: the recipe.
        top: of the recipe's inputs (without carriers): argmax, largest values and their indices of
            each row, streamed.
        options: those of the graph.
        made: counts how often the logits are made as values, and why.
    """

    def __init__(
        self,
        output: DeferredOutput,
        top: Callable[..., tuple[Tensor, ...]],
        options: Options,
        made: Made,
    ) -> None:
        self.output = output
        self.made = made
        self.options = options
        self._top = top
        self._programs: Recent[Callable[..., Any]] = Recent(PROGRAMS)
        self._shapes: Recent[Tensor] = Recent(SHAPES)
        self.has_loss = False
        """Whether the graph that returned the logits computes a loss of them as well."""
        self.bare_product = bare_product(output)
        self.large = self.keeps_whole == 0
        """Whether the logits of the last call were too many to be kept whole."""
        self.carriers = sum(kind == "carrier" for kind, _ in output.sources)
        fake_seed = tensor_of(output.seed)
        assert fake_seed is not None
        self.device = fake_seed.device.type

    @property
    def keeps_whole(self) -> int:
        """Up to how many bytes of logits are kept when the weight changes."""
        if self.options.deferred_logits is True:
            return 0
        return self.options.budget_bytes or WHOLE

    def make(self, inputs: Sequence[Any], steps: Sequence[Step] = ()) -> Tensor:
        """The logits, computed as the program has it."""
        with self.modes():
            z: Tensor = self.output.recipe(*inputs)
            root = z
            for step in steps:
                z = step(z, root=root)
        return z

    def top(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Argmax [...], largest values and indices [..., 5] of each row; no gradient."""
        with torch.no_grad(), self.modes():
            return self._top(*inputs)

    def fake(self, inputs: Sequence[Any]) -> Tensor:
        """A fake tensor with the shape, strides and dtype of the logits."""
        key = tuple(
            (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value
            for value in inputs
        )

        def made() -> Tensor:
            with FAKES, torch.no_grad():
                return self.make([fake(value) for value in inputs])

        return self._shapes.get_or(key, made)

    def program(self, steps: Sequence[Step]) -> Callable[..., Any]:
        """The recipe followed by `steps`, compiled by this backend: of the inputs (without
        carriers) and then of the steps' tensors. The steps run in the caller's autocast mode."""
        key = (self._in_mode(), *(step.key for step in steps))
        return self._programs.get_or(key, lambda: self._compile(self._joined(_behind(steps))))

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        options = dataclasses.replace(self.options, deferred_logits=False, strict=False)
        compiled: Callable[..., Any] = torch.compile(
            function, backend="elmo", options=options_dict(options)
        )
        return compiled

    def _joined(self, rest: fx.GraphModule) -> Callable[..., Any]:
        """Recipe and rest as one function, with a code object of its own: Dynamo counts
        recompilations by code object."""
        recipe, same, modes = self.output.recipe, self._in_mode(), self.modes
        count = len(self.output.sources) - self.carriers

        def logits_then(*values: Any) -> Any:
            if same:
                z = recipe(*values[:count])
            else:
                with modes():
                    z = recipe(*values[:count])
            return rest(z, *values[count:])

        code = logits_then.__code__.replace()
        return types.FunctionType(
            code, logits_then.__globals__, code.co_name, None, logits_then.__closure__
        )

    def _in_mode(self) -> bool:
        """Whether the caller's autocast mode is the one the logits are made in."""
        device, dtype, enabled = self._autocast
        if torch.is_autocast_enabled(device) != enabled:
            return False
        return not enabled or torch.get_autocast_dtype(device) == dtype

    @property
    def _autocast(self) -> tuple[str, torch.dtype, bool]:
        """Device type, dtype and whether autocast is on where the logits are made."""
        device = self.device
        for kind, dtype, enabled, _ in reversed(self.output.autocast):
            if kind == device:
                return device, dtype or torch.get_autocast_dtype(device), bool(enabled)
        return device, torch.get_autocast_dtype(device), False

    def modes(self) -> torch.autocast:
        """The autocast mode the program made its logits in."""
        device, dtype, enabled = self._autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled)


def _behind(steps: Sequence[Step]) -> fx.GraphModule:
    """The steps as one graph: of the logits and of every step's tensors."""
    graph = fx.Graph()
    root = z = last = graph.placeholder("logits")
    given = 0
    for step in steps:
        tensors = []
        for _ in step.tensors:
            given += 1
            with graph.inserting_after(last):
                last = graph.placeholder(f"given_{given}")
            tensors.append(last)
        z = step.emit(graph, z, tensors, root)
    graph.output(z)
    return fx.GraphModule({}, graph)


def options_dict(options: Options) -> dict[str, Any]:
    """Options as torch.compile takes them."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    values["inductor"] = None if options.inductor is None else dict(options.inductor)
    return values


def fake(value: Any) -> Any:
    """A tensor without values; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


class _Fakes:
    """One mode of fake tensors for all threads, which enter it one at a time: data are prepared in
    threads of their own, and what a tensor made there is like is asked in others. (Tried on torch
    2.11 and 2.13.)"""

    def __init__(self) -> None:
        self._mode: Any = FakeTensorMode()
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._mode.__enter__()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._mode.__exit__(*error)
        finally:
            self._lock.release()


FAKES = _Fakes()
