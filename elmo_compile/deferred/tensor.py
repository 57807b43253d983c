"""`Deferred`: a tensor without values that behaves as the tensor it stands for.

It comes out of an autograd node, so gradients, hooks and in-place writes are autograd's own. Below
autograd, `__torch_dispatch__` runs every operation on the values, made when first needed. Above it,
`__torch_function__` catches what need not make them (`functions.py`). Dynamo sees a wrapper
subclass and asks for the values (tried on torch 2.11 and 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elmo_compile.deferred.made import COMPILED, EXCLUDED, read_by
from elmo_compile.deferred.origin import FAKES, Origin, fake
from elmo_compile.deferred.state import Derived, Given, Root, State, version
from elmo_compile.deferred.step import Step
from elmo_compile.errors import FusedUpdateError
from elmo_compile.ops.exclusion import is_excluded
from elmo_compile.ops.linear import carry


class Deferred(Tensor):
    """Logits that are computed when their values are needed."""

    _state: State
    losses: list[tuple[Tensor, list[Step]]]
    """What was streamed from this very tensor, and the steps from here to each result."""
    watched = False
    """Whether someone asked for the gradient of these logits."""
    _entered: Any = None
    """The autograd node that hands their gradient to the recipe's inputs, and only there."""

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
        made._state, made.losses = state, []
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
        self._state = Given(values.detach())

    def become_view(self) -> None:
        """Turn a deferred view into the view itself: a write into it must reach what it views."""
        state = self._state
        if not isinstance(state, Derived) or not state.is_view:
            return
        if isinstance(state.source, Deferred):
            state.source.become_view()
        with torch._C.DisableTorchFunctionSubclass():
            view = state.step(state.source)
        torch.utils.swap_tensors(self, view)  # type: ignore[no-untyped-call]

    def attach(self) -> None:
        """Their gradient goes to the recipe's inputs: by the node that they come out of now."""
        self._entered = self._node

    @property
    def attached(self) -> bool:
        """Whether their gradient goes to the recipe's inputs, and only there. It does not where
        they became a leaf, or the result of another node, since they were made."""
        return self._entered is not None and self._entered is self._node

    @property
    def _node(self) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn

    @property
    def written(self) -> bool:
        """Whether someone wrote into the logits, or into a view of them: torch counts it here,
        but in inference mode, where whoever made the values may have."""
        if isinstance(self._state, Given):
            return True
        with torch._C.DisableTorchFunctionSubclass():
            if self.is_inference():
                return self._state.values is not None
            return bool(version(self))

    @property
    def untouched(self) -> bool:
        """Whether nobody wrote into these logits, nor asked for their gradient or for that of what
        they are made from: the recipe stands for them."""
        return not (self.asked_for or self.written)

    @property
    def asked_for(self) -> bool:
        """Whether someone asked for the gradient of these logits or of what they are made from."""
        state = self._state
        source = state.source if isinstance(state, Derived) else None
        return self.watched or (isinstance(source, Deferred) and source.asked_for)

    def remember(self, loss: Tensor, *steps: Step) -> None:
        """Note a result that was streamed, for `torch.autograd.grad(loss, logits)`."""
        self.losses.append((loss, list(steps)))
        state = self._state
        if isinstance(state, Derived) and isinstance(state.source, Deferred):
            state.source.remember(loss, state.step, *steps)

    def watch(self, how: str) -> None:
        """Someone asks for the gradient of these logits.

        Raises:
            RuntimeError: a loss of them was streamed: in its graph they are not.
        """
        self._refuse_beside_loss(how)
        if self.losses:
            raise RuntimeError(
                f"elmo_compile: `{how}` of deferred logits comes after a loss of them, whose "
                "backward would not see it; call it before the loss is taken, or take the loss of "
                "logits.materialize()"
            )
        self.watched = True

    def streamed(self, how: str) -> bool:
        """Whether losses of these logits were streamed, in whose graphs they are not.

        Raises:
            RuntimeError: as `watch`, of logits returned beside a loss of them.
        """
        self._refuse_beside_loss(how)
        return bool(self.losses)

    def _refuse_beside_loss(self, how: str) -> None:
        root, _ = self._state.recipe()
        if self.attached and isinstance(root, Root) and root.origin.has_loss:
            raise RuntimeError(
                f"elmo_compile: `{how}` of deferred logits that a compiled function returned "
                "beside a loss of them, whose backward would not see it; compile with "
                "options={'deferred_logits': False}, or take the loss outside"
            )

    def keep_gradient(self, *parts: Tensor | None) -> None:
        """Let `.grad` be the sum of these, and grow from now on: `backward(inputs=[logits])`."""
        self.watched = True
        found = [part for part in parts if part is not None]
        with torch._C.DisableTorchFunctionSubclass():
            self.retain_grad()
            self.grad = functools.reduce(torch.add, found).contiguous() if found else None

    @property
    def elmo_values(self) -> Tensor:
        """What `__tensor_flatten__` names."""
        return self._state.real(COMPILED)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        self._state.real(COMPILED)
        return ["elmo_values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Tensor:
        return Deferred(Given(inner["elmo_values"]))

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
        why = functools.partial(read_by, func.overloadpacket.__name__)
        plain_args, plain_kwargs = pytree.tree_map_only(
            Deferred, lambda d: d._state.real(why), (args, kwargs or {})
        )
        result = func(*plain_args, **plain_kwargs)
        writes = func._schema.arguments[:1] and func._schema.arguments[0].alias_info
        if writes and writes.is_write and isinstance(args[0], Deferred):
            return args[0]
        return result


@functools.cache
def _keep_from_dynamo() -> None:
    """Let Dynamo trace through `__torch_function__`, but not compile it as a function of its own
    where a graph broke before: there it would be compiling, and what it does then is not what it
    is to do when it runs. Tried on torch 2.11, 2.13 and 2.15."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    function: Any = Deferred.__torch_function__
    frames.set_code_exec_strategy(function.__func__.__code__, skip)


_SHAPED = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("ones_like", "zeros_like", "empty_like", "full_like", "rand_like", "randn_like",
                 "new_empty", "new_zeros", "new_ones", "new_full")
)  # fmt: skip


class Defer(torch.autograd.Function):
    """Root deferred logits as a function of a recipe's inputs."""

    @staticmethod
    def forward(ctx: Any, root: Root, *inputs: Any) -> Tensor:
        ctx.origin = root.origin
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        ctx.others = [None if isinstance(v, Tensor) else v for v in inputs]
        return Deferred(root)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [o if t is None else t for t, o in zip(_unchanged(ctx), ctx.others)]
        wanted = ctx.needs_input_grad[1:]
        return (None, *_gradients(ctx.origin.make, inputs, wanted, grads[0]))


def _unchanged(ctx: Any) -> tuple[Tensor | None, ...]:
    """What was saved. Raises FusedUpdateError if it has been written to since."""
    try:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise FusedUpdateError(
            "a backward reached the values of deferred logits whose weight or features changed "
            "since the forward. Under elmo_compile.optim it was a loss of the same logits that "
            "updated the head's weight first: compile the two together (compile the function that "
            "computes their sum), or construct the optimizer with update_at='step'"
        ) from error
    return saved


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

        before = _before_in_graph(state) if torch.is_grad_enabled() else state.before()
        return (None, *_gradients(step, [before], [True], grads[0]))


def _before_in_graph(state: Derived) -> Tensor:
    """What a step was applied to, with its gradient: the step is differentiated twice."""
    if state.source_changed or not isinstance(state.source, Deferred):
        raise RuntimeError(
            "elmo_compile: a backward with create_graph=True reached deferred logits that were "
            "written to since; call logits.materialize() before the write"
        )
    return state.source.materialize()


def _gradients(make: Any, inputs: Sequence[Any], wanted: Sequence[bool], grad: Tensor) -> list[Any]:
    """Gradients of a recomputed tensor with respect to those of its inputs that want one.

    Under `create_graph` they are functions of the inputs themselves, as autograd's own are.
    """
    again = torch.is_grad_enabled()

    def leaf(value: Any, wants: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.view_as(value) if again and wants else value.detach().requires_grad_(wants)

    leaves = [leaf(value, wants) for value, wants in zip(inputs, wanted)]
    with torch.enable_grad():
        made = make(leaves)
    asked = [leaf for leaf, wants in zip(leaves, wanted) if wants]
    found = iter(torch.autograd.grad(made, asked, grad, allow_unused=True, create_graph=again))
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
    _keep_from_dynamo()
    grad = origin.output.requires_grad and torch.is_grad_enabled()
    sources = origin.output.sources
    carried = {position for kind, position in sources if kind == "carrier"}
    values, entering, carriers = [], [], []
    for kind, position in sources:
        value = results[position] if kind == "output" else inputs[position]
        if kind == "carrier":
            carriers.append(carry(value) if grad and value.requires_grad else None)
            continue
        values.append(value)
        leaves_by_carrier = kind == "input" and position in carried
        entering.append(value.detach() if leaves_by_carrier else value)
    root = Root(origin, values, collected)
    origin.large = root.large
    with torch.set_grad_enabled(grad):
        made: Deferred = Defer.apply(root, *entering, *carriers)  # type: ignore[no-untyped-call]
    made.attach()
    excluded = any(isinstance(v, torch.nn.Parameter) and is_excluded(v) for v in values)
    if not excluded:
        return made
    root.real(EXCLUDED)
    return made.materialize()


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
    if made is logits._state.fake:
        return logits  # As torch does: a cast to the dtype it has is the tensor itself.
    state = Derived(logits, logits._state, step.frozen(), made)
    derived: Deferred = Derive.apply(state, logits)  # type: ignore[no-untyped-call]
    if logits.attached:
        derived.attach()
    return derived
