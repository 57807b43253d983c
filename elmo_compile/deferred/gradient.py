"""The gradient of logits by a streamed loss, in whose graph they are not."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd.graph import GradientEdge

from elmo_compile.deferred.step import Step
from elmo_compile.deferred.tensor import Deferred


def gradient(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """As torch's, by the chain rule: through streamed losses, and through the values' own graph.

    Raises:
        RuntimeError: an input takes no part (as torch's), or second derivatives are asked for.
    """
    asked = _listed(inputs)
    losses = {
        id(loss): loss for value in asked if isinstance(value, Deferred) for loss, _ in value.losses
    }
    if losses and (create_graph or is_grads_batched):
        raise RuntimeError(
            "elmo_compile: second derivatives of a loss of deferred logits; call "
            "logits.materialize() and take the loss of that"
        )
    given = _edges(_listed(outputs)), _edges([*asked, *losses.values()]), grad_outputs
    with _as_plain(given):
        found = torch.autograd.grad(
            *given, retain_graph, create_graph, is_grads_batched=is_grads_batched, allow_unused=True
        )
    by_loss: dict[int, Tensor | None] = dict(zip(losses, found[len(asked) :]))
    totals = [
        _with_losses(value, direct, by_loss) if isinstance(value, Deferred) else direct
        for value, direct in zip(asked, found)
    ]
    if materialize_grads:
        return tuple(
            torch.zeros_like(v) if total is None else total for v, total in zip(asked, totals)
        )
    if not allow_unused and any(total is None for total in totals):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set "
            "allow_unused=True if this is the desired behavior."
        )
    return tuple(totals)


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """As `torch.autograd.backward`; deferred logits among `inputs` get their `.grad`.

    Raises:
        RuntimeError: logits that a compiled function returned beside a loss of them.
    """
    asked = [] if inputs is None else _listed(inputs)
    logits = [v for v in asked if isinstance(v, Deferred) and v.streamed("backward(inputs=)")]
    others = [v for v in asked if not any(v is one for one in logits)]
    # If they keep theirs, what follows adds to it.
    before = [value.grad if value.retains_grad else None for value in logits]
    totals: tuple[Tensor | None, ...] = ()
    if logits:
        keep = True if others else retain_graph
        totals = gradient(tensors, logits, grad_tensors, keep, create_graph, allow_unused=True)
    if others or not logits:
        given = _edges(_listed(tensors)), grad_tensors, retain_graph, create_graph
        into = None if inputs is None else others
        with _as_plain((given, into)):
            torch.autograd.backward(*given, inputs=into)
    for value, *parts in zip(logits, before, totals):
        value.keep_gradient(*parts)


def _listed(given: Any) -> list[Any]:
    """What torch takes alone, in a sequence or in a dict."""
    if isinstance(given, Tensor | GradientEdge):
        return [given]
    return list(given.values() if isinstance(given, dict) else given)


def _edges(values: list[Any]) -> list[Any]:
    """Deferred values as where they are in autograd's graph, which torch takes as well."""
    return [
        GradientEdge(value.grad_fn, value.output_nr)
        if isinstance(value, Deferred) and value.grad_fn is not None
        else value
        for value in values
    ]


def _as_plain(given: Any) -> contextlib.AbstractContextManager[None]:
    """Around a call that would come back to `Deferred.__torch_function__` for an argument.

    For these alone: backward formulas and hooks run in it, compilers among them, and those of torch
    2.11 need `__torch_function__` of their own.
    """
    if any(isinstance(leaf, Deferred) for leaf in pytree.tree_leaves(given)):
        return torch._C.DisableTorchFunctionSubclass()
    return contextlib.nullcontext()


def _with_losses(
    logits: Deferred, direct: Tensor | None, by_loss: dict[int, Tensor | None]
) -> Tensor | None:
    """The gradient of logits through their own graph and through each streamed loss."""
    total = direct
    for loss, steps in logits.losses:
        upstream = by_loss[id(loss)]
        if upstream is not None:
            part = _through(logits.values_at_first(), steps, upstream)
            total = part if total is None else total + part
    return total


def _through(values: Tensor, steps: Sequence[Step], upstream: Tensor) -> Tensor:
    leaf = values.detach().requires_grad_()
    made: Any = leaf
    with torch.enable_grad():
        for step in steps:
            made = step(made)
    (found,) = torch.autograd.grad(made, [leaf], [upstream])
    return found
