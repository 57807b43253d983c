"""The gradient of logits by a streamed loss, in whose graph they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
    with torch._C.DisableTorchFunctionSubclass():
        found = torch.autograd.grad(
            _listed(outputs), [*asked, *losses.values()], grad_outputs, retain_graph, create_graph,
            is_grads_batched=is_grads_batched, allow_unused=True,
        )  # fmt: skip
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
        with torch._C.DisableTorchFunctionSubclass():
            torch.autograd.backward(
                tensors, grad_tensors, retain_graph, create_graph,
                inputs=None if inputs is None else others,
            )  # fmt: skip
    for value, *parts in zip(logits, before, totals):
        value.keep_gradient(*parts)


def _listed(given: Any) -> list[Any]:
    """What torch takes alone, in a sequence or in a dict."""
    if isinstance(given, Tensor | GradientEdge):
        return [given]
    return list(given.values() if isinstance(given, dict) else given)


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
