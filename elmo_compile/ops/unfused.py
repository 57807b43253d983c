"""Why a weight was not updated by its head's backward, as far as the compiled graphs know."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_reasons: WeakIdKeyDictionary = WeakIdKeyDictionary()
_local = threading.local()
_NEAR_BY = 256
"""Nodes of autograd that are looked at."""
FROZEN = "the weight is frozen"


@contextlib.contextmanager
def read_elsewhere(weights: Sequence[Tensor]) -> Iterator[None]:
    """Around a loss of logits whose graph reads these for something else too: their gradient is
    more than the head's."""
    before = getattr(_local, "weights", ())
    _local.weights = weights
    try:
        yield
    finally:
        _local.weights = before


def is_read_elsewhere(weight: Tensor) -> bool:
    """Whether `read_elsewhere` is around with this weight."""
    return any(weight is other for other in getattr(_local, "weights", ()))


def note(weight: Tensor, why: str) -> None:
    """Remember the last reason; for a computed weight, of the parameters it is made of."""
    for parameter in made_of(weight):
        _reasons[parameter] = why


def made_of(weight: Tensor) -> list[Tensor]:
    """A weight, or if it is computed the parameters with as many rows that autograd finds before
    it, near by."""
    if weight.is_leaf:
        return [weight]
    found: list[Tensor] = []
    seen, work = {weight.grad_fn}, [weight.grad_fn]
    while work and len(seen) < _NEAR_BY:
        node = work.pop(0)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf.shape[:1] == weight.shape[:1]:
            found.append(leaf)
        for earlier, _ in () if node is None else node.next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                work.append(earlier)
    return found


def any_frozen_head() -> bool:
    """Whether a graph of this process has a head whose weight is frozen: nothing is to be fused,
    whoever trains the rest (an adapter, an encoder)."""
    noted = list(_reasons.items())  # type: ignore[no-untyped-call]
    return any(why == FROZEN and not weight.requires_grad for weight, why in noted)


def reason(weight: Tensor) -> str:
    """The last reason noted; empty if there is none."""
    return str(_reasons.get(weight, ""))  # type: ignore[no-untyped-call]
