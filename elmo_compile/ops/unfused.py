"""Why a weight was not updated by its head's backward, as far as the compiled graphs know."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_reasons: WeakIdKeyDictionary = WeakIdKeyDictionary()
_local = threading.local()


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
    """Remember the last reason."""
    _reasons[weight] = why


def reason(weight: Tensor) -> str:
    """The last reason noted; empty if there is none."""
    return str(_reasons.get(weight, ""))  # type: ignore[no-untyped-call]
