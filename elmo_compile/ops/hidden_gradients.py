"""Gradients that Dynamo must not see while it traces.

A bf16 or fp8 weight gets a float32 gradient. Dynamo takes no tensor whose gradient has another
dtype: it breaks the graph there, so a new batch size while gradients are being accumulated would
make the logits, eagerly. So such gradients are taken off their weights when a compilation begins
and put back when it ends: nothing runs backward in between. Tried on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_watched: MutableMapping[Tensor, None] = WeakIdKeyDictionary()
_hidden: list[tuple[Tensor, Tensor]] = []


def watch(weight: Tensor) -> None:
    """Hide the gradient of a weight from later compilations, if it has another dtype."""
    from torch._dynamo.callback import callback_handler  # slow to import

    _watched[weight] = None
    if _hide not in callback_handler.start_callbacks:  # torch._dynamo.reset() removes callbacks
        callback_handler.register_start_callback(_hide)
        callback_handler.register_end_callback(_restore)


def _hide(args: Any) -> None:
    if args.callback_trigger.name != "DYNAMO":
        return  # a backward compiled late: autograd may be adding to these very gradients
    for weight in list(_watched.keys()):
        grad = weight.grad
        if grad is not None and grad.dtype != weight.dtype:
            _hidden.append((weight, grad))
            weight.grad = None


def _restore(args: Any) -> None:
    while _hidden:
        weight, grad = _hidden.pop()
        # Nothing should have been added meanwhile; nothing is lost if it was.
        weight.grad = grad if weight.grad is None else grad + weight.grad
