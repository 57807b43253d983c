"""Why a weight was not updated by its head's backward, as far as the compiled graphs know."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_reasons: WeakIdKeyDictionary = WeakIdKeyDictionary()


def note(weight: Tensor, why: str) -> None:
    """Remember the last reason."""
    _reasons[weight] = why


def reason(weight: Tensor) -> str:
    """The last reason noted; empty if there is none."""
    return str(_reasons.get(weight, ""))  # type: ignore[no-untyped-call]
