"""The autograd nodes that deferred tensors come out of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.deferred.made import EXCLUDED
from elmo_compile.deferred.origin import FAKES, Origin, fake
from elmo_compile.deferred.state import Derived, Root
from elmo_compile.deferred.step import Step
from elmo_compile.deferred.tensor import Deferred, autograd_view, keep_from_dynamo
from elmo_compile.errors import FusedUpdateError
from elmo_compile.ops.exclusion import is_excluded
from elmo_compile.ops.linear import carry
from elmo_compile.ops.reached import note_values


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
    keep_from_dynamo()
    grad = origin.output.requires_grad and torch.is_grad_enabled()
    sources = origin.output.sources
    carried = {position for kind, position in sources if kind == "carrier"}
    values, carriers = [], []
    for kind, position in sources:
        value = results[position] if kind == "output" else inputs[position]
        if kind == "carrier":
            carriers.append(carry(value) if grad and value.requires_grad else None)
        else:
            values.append(value)
    values = _kept(origin, values)
    entering = [
        value.detach() if kind == "input" and position in carried else value
        for (kind, position), value in zip(sources, values)
    ]
    root = Root(origin, values, collected)
    origin.large = root.large
    with torch.set_grad_enabled(grad):
        made: Deferred = Defer.apply(root, *entering, *carriers)  # type: ignore[no-untyped-call]
    made.attach()
    for value in values:
        if made.grad_fn is not None and isinstance(value, torch.nn.Parameter):
            note_values(value, made.grad_fn)
    excluded = any(isinstance(v, torch.nn.Parameter) and is_excluded(v) for v in values)
    if not excluded:
        return made
    root.real(EXCLUDED)
    return made.materialize()


_COPIED = 4
"""An input that the caller may write into is copied if it is that many times smaller than the
logits."""


def _kept(origin: Origin, values: Sequence[Any]) -> list[Any]:
    """The recipe's inputs as they are now. Features in memory that the caller has, and whatever
    else is small, are copied: writes that torch does not count (through numpy, or `.data`) would be
    read as logits. Weights are watched instead."""
    logits = origin.fake(values)
    most = logits.numel() * logits.element_size() // _COPIED

    def kept(place: int, value: Any) -> Any:
        small = type(value) is Tensor and value.nbytes <= most
        return value.clone() if small and place in origin.output.shared else value

    return [kept(place, value) for place, value in enumerate(values)]


def derive(logits: Deferred, step: Step, others: Sequence[Deferred] = ()) -> Tensor | None:
    """`step` of deferred logits as deferred logits; None if it is not one tensor of known shape.

    Args:
        others: deferred tensors of the same logits among the step's arguments.
    """
    state = logits._state
    root, _ = state.recipe()
    try:
        with FAKES, torch.no_grad():
            made = step(state.fake, [fake(tensor) for tensor in step.tensors], root.fake)
    except Exception:  # Whatever it is, the operation itself raises it better.
        return None
    if not isinstance(made, Tensor) or made.ndim == 0 < state.fake.ndim:
        return None  # One number: nothing that streams is made of it.
    if made is logits._state.fake:
        return logits  # As torch does: a cast to the dtype it has is the tensor itself.
    state = Derived(logits, logits._state, step.frozen(), made, others)
    derived: Deferred
    if state.is_view:
        derived = autograd_view(logits, step)
        derived._state = state
    else:
        derived = Derive.apply(state, logits)  # type: ignore[no-untyped-call]
    if logits.attached:
        derived.attach()
    return derived
