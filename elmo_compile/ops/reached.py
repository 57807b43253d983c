"""What else a backward reaches: uses of a weight that its update inside backward() would spoil.

A backward that updates a weight is refused as a whole, before anything is written, where it would
later meet another use of the same weight: a second fused loss, or values of its deferred logits.

Uses a private API: `torch._C._will_engine_execute_node` (tried on torch 2.11, 2.13 and 2.15).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_losses: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight -> nodes of autograd's graph, one for each call of a fused loss, held weakly."""
_values: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight -> nodes through which gradients of logits reach it, held weakly."""


def note_loss(weight: Tensor, node: Any) -> None:
    """A fused loss of `weight`; a backward through it executes `node`."""
    _losses.setdefault(weight, weakref.WeakSet()).add(node)  # type: ignore[no-untyped-call]


def note_values(weight: Tensor, node: Any) -> None:
    """Logits of `weight`; a backward through their values executes `node`."""
    _values.setdefault(weight, weakref.WeakSet()).add(node)  # type: ignore[no-untyped-call]


def reaches_values(weight: Tensor) -> bool:
    """Whether the backward that runs now goes through values of logits of `weight`."""
    return any(map(_runs, _values.get(weight, ())))  # type: ignore[no-untyped-call]


def reaches_two_losses(weight: Tensor) -> bool:
    """Whether the backward that runs now goes through several fused losses of `weight`."""
    return sum(map(_runs, _losses.get(weight, ()))) > 1  # type: ignore[no-untyped-call]


def _runs(node: Any) -> bool:
    return bool(torch._C._will_engine_execute_node(node))
