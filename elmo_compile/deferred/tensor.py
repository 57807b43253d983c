"""`Deferred`: a tensor without values that behaves as the tensor it stands for.

It comes out of an autograd node, so gradients, hooks and in-place writes are autograd's own. Below
autograd, `__torch_dispatch__` runs every operation on the values, made when first needed. Above it,
`__torch_function__` catches what need not make them (`functions.py`). Dynamo sees a wrapper
subclass and asks for the values (tried on torch 2.11 and 2.13).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elmo_compile.deferred.origin import FAKES, Origin, fake
from elmo_compile.deferred.step import Step
from elmo_compile.errors import StaleLogitsError
from elmo_compile.ops.kept import watch
from elmo_compile.ops.linear import carry


class State:
    """What one deferred tensor stands for: a recipe and its inputs, or a step after another state.

    Held by the tensor and by those made from it; told before a weight among its inputs changes.
    """

    def __init__(self, fake: Tensor) -> None:
        self.fake = fake
        """Shape, strides and dtype."""
        self._values: Tensor | None = None
        self.losses: list[tuple[Tensor, list[Step]]] = []
        """Losses streamed from this state, and the steps from here to each."""

    @property
    def values(self) -> Tensor | None:
        """The values, if they were made."""
        return self._values

    @property
    def available(self) -> bool:
        """Whether the values are there or need no weight any more."""
        return self._values is not None

    def real(self) -> Tensor:
        """The values, made now if need be. Raises StaleLogitsError if that is too late."""
        if self._values is None:
            with torch.no_grad():
                self._values = self._make()
        return self._values

    def recipe(self) -> tuple[State, list[Step]]:
        """The root, and every step behind it."""
        return self, []

    def remake(self, steps: Sequence[Step]) -> Tensor:
        """Of a root: what the steps make of its values as they were at first."""
        raise NotImplementedError

    def _make(self) -> Tensor:
        raise NotImplementedError

    def remember(self, loss: Tensor, *steps: Step) -> None:
        """Note a loss that was streamed, for `torch.autograd.grad(loss, logits)`."""
        self.losses.append((loss, list(steps)))

    def top(self) -> tuple[Tensor, ...] | None:
        """Argmax, five largest values and indices of each row; None if that does not apply."""
        raise NotImplementedError


class Root(State):
    """A recipe and the inputs of one call."""

    def __init__(self, origin: Origin, inputs: Sequence[Any], collected: Any = None) -> None:
        super().__init__(origin.fake(inputs))
        self.origin = origin
        self._collected: Any = None
        if collected is not None:
            self.collect(collected)
        self.inputs = tuple(inputs)
        self._versions = [_version(value) for value in inputs]
        self._top: tuple[Tensor, ...] | None = None
        for value in inputs:
            if isinstance(value, torch.nn.Parameter):
                watch(value, self)

    def remake(self, steps: Sequence[Step]) -> Tensor:
        self.check()
        return self.origin.make(self.inputs, steps)

    @property
    def stale(self) -> bool:
        """Whether an input changed since the forward."""
        return [_version(value) for value in self.inputs] != self._versions

    def check(self) -> None:
        """Raise StaleLogitsError if the values can no longer be made."""
        if self.stale:
            raise StaleLogitsError(
                "the logits were deferred, and the weights they are made from have changed since "
                "(an update inside backward(), optimizer.step(), or a write). Read them before "
                "backward(), call `.materialize()` on them, or compile with "
                "options={'deferred_logits': False}; argmax and topk(k <= 5) of each row were kept"
            )

    def _make(self) -> Tensor:
        return self.remake(())

    def top(self) -> tuple[Tensor, ...] | None:
        if self._top is None:
            if self._collected is not None:
                self._top = self._shaped(*self._collected.result())
            elif self.stale:
                return None
            else:
                self._top = self.origin.top(self.inputs)
        return self._top

    def collect(self, top: Any) -> None:
        """Take the largest logits that a loss pass found (`TopRows`), if they are of these rows."""
        if self._collected is None and top.rows * self.fake.shape[-1] == self.fake.numel():
            self._collected = top

    def _shaped(self, values: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """The largest logits that a loss pass collected, [N, k], as `Origin.top` gives them."""
        rows = self.fake.shape[:-1]
        values = values.to(self.fake.dtype).reshape(*rows, -1)
        indices = indices.reshape(*rows, -1)
        return indices[..., 0], values, indices

    def before_change(self) -> None:
        """Keep what can be kept: the values where they are small, else the top of each row."""
        if self._values is not None or self.stale:
            return
        if not self.origin.large:
            self.real()
        else:
            self.top()


class Derived(State):
    """A cast, a view or another step after a state."""

    def __init__(self, source: Deferred, step: Step, made: Tensor) -> None:
        super().__init__(made)
        self.source: Tensor = source
        """What the step is applied to; an ordinary tensor once it was written as a view."""
        self.parent, self.step = source._state, step

    @property
    def source_changed(self) -> bool:
        """Whether someone wrote into what the step is applied to."""
        return not isinstance(self.source, Deferred) or self.source.written

    @property
    def available(self) -> bool:
        return self._values is not None or self.parent.available

    def recipe(self) -> tuple[State, list[Step]]:
        root, steps = self.parent.recipe()
        return root, [*steps, self.step]

    def before(self) -> Tensor:
        """What the step was applied to, as it was then."""
        if self.source_changed:
            root, steps = self.parent.recipe()
            return root.remake(steps)
        return self.parent.real()

    def remember(self, loss: Tensor, *steps: Step) -> None:
        super().remember(loss, *steps)
        self.parent.remember(loss, self.step, *steps)

    @property
    def is_view(self) -> bool:
        """Whether the step shares memory with what it was applied to."""
        root_bytes = self.parent.fake.untyped_storage()._cdata
        return bool(self.fake.untyped_storage()._cdata == root_bytes)

    def _make(self) -> Tensor:
        made: Tensor = self.step(self.before())
        return made

    def top(self) -> tuple[Tensor, ...] | None:
        found = self.parent.top()
        size = self.fake.shape[-1] if self.fake.ndim else 0
        if found is None or self.fake.ndim < 2 or size != self.parent.fake.shape[-1]:
            return None
        first, values, indices = found
        name, rows = self.step.func.__name__, self.fake.shape[:-1]
        if name == "__getitem__" and self.step.indexes_rows(self.parent.fake.ndim):
            values, indices = self.step(values), self.step(indices)
            return indices[..., 0], values, indices
        if name in ("view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous"):
            return (
                first.reshape(rows),
                values.reshape(*rows, values.shape[-1]),
                indices.reshape(*rows, values.shape[-1]),
            )
        wider = self.fake.element_size() >= self.parent.fake.element_size()
        # Rounded to fewer bits, other logits may tie with the largest.
        if wider and name in ("float", "double", "half", "bfloat16", "to", "type"):
            return first, values.to(self.fake.dtype), indices
        return None


class Deferred(Tensor):
    """Logits that are computed when their values are needed."""

    _state: State
    watched = False
    """Whether someone asked for the gradient of these logits."""
    attached = False
    """Whether their gradient goes to the recipe's inputs, and only there."""

    @staticmethod
    def __new__(cls, state: State) -> Deferred:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            state.fake.shape,
            strides=state.fake.stride(),
            storage_offset=0,
            dtype=state.fake.dtype,
            device=state.fake.device,
        )
        made._state = state
        found: Deferred = made
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        values = self._state.values
        if values is not None and type(values) is not Tensor:
            return f"Deferred({tuple(values.shape)}, {values.dtype})"  # Inside a trace.
        return repr(self.materialize())

    def materialize(self) -> Tensor:
        """An ordinary tensor with these values and their gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.view(self.shape)

    def replace_values(self, values: Tensor) -> None:
        """`logits.data = values`. Raises RuntimeError if they are of another shape or dtype."""
        if values.shape != self.shape or values.dtype != self.dtype:
            raise RuntimeError(
                f"deferred logits of shape {tuple(self.shape)} and {self.dtype} cannot take data "
                f"of shape {tuple(values.shape)} and {values.dtype}; call .materialize() first"
            )
        self._state = _Given(values.detach())

    def become_view(self) -> None:
        """Turn a deferred view into the view itself: a write into it must reach what it views."""
        state = self._state
        if not isinstance(state, Derived):
            return
        if isinstance(state.source, Deferred) and state.is_view:
            state.source.become_view()
        with torch._C.DisableTorchFunctionSubclass():
            view = state.step(state.source)
        torch.utils.swap_tensors(self, view)  # type: ignore[no-untyped-call]

    @property
    def written(self) -> bool:
        """Whether someone wrote into the logits, or into a view of them: torch counts it here."""
        if isinstance(self._state, _Given):
            return True
        with torch._C.DisableTorchFunctionSubclass():
            return bool(_version(self))

    @property
    def untouched(self) -> bool:
        """Whether nobody wrote into these logits, nor asked for their gradient or for that of what
        they are made from: the recipe stands for them."""
        tensor: Tensor = self
        while isinstance(tensor, Deferred):
            if tensor.watched:
                return False
            tensor = getattr(tensor._state, "source", torch.empty(0))
        return not self.written

    @property
    def elmo_values(self) -> Tensor:
        """What `__tensor_flatten__` names."""
        return self._state.real()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        self._state.real()
        return ["elmo_values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Tensor:
        return Deferred(_Given(inner["elmo_values"]))

    def _stable_hash_for_caching(self) -> str:
        return "elmo_compile.Deferred"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not torch.compiler.is_compiling():
            from elmo_compile.deferred.functions import handle

            handled = handle(func, args, kwargs or {})
            if handled is not NotImplemented:
                return handled
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Deferred(args[0]._state)
        if func in _SHAPED and isinstance(args[0], Deferred):
            # Only the shape is read.
            size = args[0]._state.fake
            shaped = torch.zeros((), dtype=size.dtype, device=args[0].device).expand(size.shape)
            return func(shaped, *args[1:], **(kwargs or {}))
        plain_args, plain_kwargs = pytree.tree_map_only(
            Deferred, lambda d: d._state.real(), (args, kwargs or {})
        )
        result = func(*plain_args, **plain_kwargs)
        writes = func._schema.arguments[:1] and func._schema.arguments[0].alias_info
        if writes and writes.is_write and isinstance(args[0], Deferred):
            return args[0]
        return result


_SHAPED = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("ones_like", "zeros_like", "empty_like", "full_like", "rand_like", "randn_like",
                 "new_empty", "new_zeros", "new_ones", "new_full")
)  # fmt: skip


class _Given(State):
    """Values that exist, as Dynamo hands them in."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self._values = values


class Defer(torch.autograd.Function):
    """Root deferred logits as a function of a recipe's inputs."""

    @staticmethod
    def forward(ctx: Any, root: Root, *inputs: Any) -> Tensor:
        ctx.root = weakref.ref(root)
        ctx.origin = root.origin
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        ctx.others = [None if isinstance(v, Tensor) else v for v in inputs]
        return Deferred(root)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.others)]
        wanted = ctx.needs_input_grad[1:]
        return (None, *_gradients(ctx.origin.make, inputs, wanted, grads[0]))


class Derive(torch.autograd.Function):
    """A step after deferred logits."""

    @staticmethod
    def forward(ctx: Any, state: Derived, logits: Tensor) -> Tensor:
        ctx.state = state
        return Deferred(state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        state: Derived = ctx.state

        def step(inputs: list[Tensor]) -> Tensor:
            made: Tensor = state.step(inputs[0])
            return made

        return (None, *_gradients(step, [state.before()], [True], grads[0]))


def _gradients(make: Any, inputs: Sequence[Any], wanted: Sequence[bool], grad: Tensor) -> list[Any]:
    """Gradients of a recomputed tensor with respect to those of its inputs that want one."""
    leaves = [
        value.detach().requires_grad_(wants) if isinstance(value, Tensor) else value
        for value, wants in zip(inputs, wanted)
    ]
    with torch.enable_grad():
        made = make(leaves)
    asked = [leaf for leaf, wants in zip(leaves, wanted) if wants]
    found = iter(torch.autograd.grad(made, asked, grad, allow_unused=True))
    return [next(found) if wants else None for wants in wanted]


def defer(
    origin: Origin, inputs: Sequence[Any], results: Sequence[Any], collected: Any = None
) -> Tensor:
    """The deferred logits of one call of a graph.

    Args:
        origin: the recipe.
        inputs: the graph's inputs, as it was called.
        results: its results, with what the recipe reads behind them.
        collected: `TopRows` of the loss pass over these logits, if it made them.
    """
    grad = origin.output.requires_grad and torch.is_grad_enabled()
    values: list[Any] = []
    carriers: list[Any] = []
    for kind, position in origin.output.sources:
        value = results[position] if kind == "output" else inputs[position]
        if kind == "carrier":
            wanted = grad and value.requires_grad
            carriers.append(carry(value) if wanted else None)
        else:
            values.append(value)
    root = Root(origin, values, collected)
    size = root.fake.numel() * root.fake.element_size()
    origin.large = size > origin.keeps_whole
    carried = {p for kind, p in origin.output.sources if kind == "carrier"}
    entering = [
        value.detach() if kind == "input" and position in carried else value
        for (kind, position), value in zip(origin.output.sources, values)
    ]
    with torch.set_grad_enabled(grad):
        made: Deferred = Defer.apply(root, *entering, *carriers)  # type: ignore[no-untyped-call]
    made.attached = True
    return made


def derive(logits: Deferred, step: Step) -> Tensor | None:
    """`step` of deferred logits as deferred logits; None if it is not one tensor of known shape."""
    state = logits._state
    try:
        with FAKES, torch.no_grad():
            made = step(state.fake, [fake(tensor) for tensor in step.tensors])
    except Exception:  # Whatever it is, the operation itself raises it better.
        return None
    if not isinstance(made, Tensor):
        return None
    state = Derived(logits, step.frozen(), made)
    derived: Deferred = Derive.apply(state, logits)  # type: ignore[no-untyped-call]
    derived.attached = logits.attached
    return derived


def _version(value: Any) -> int:
    """How often a tensor was written in place, as far as torch counts it."""
    if not isinstance(value, Tensor) or value.is_inference():
        return 0
    return int(value._version)
