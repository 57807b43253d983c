"""Weights the user wants left alone: `elmo_compile.exclude`.

Like owners, exclusions belong to Parameter objects and are looked up at every call, because Dynamo
shares one graph between modules of the same code.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_excluded: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Exclusion:
    """Kept by an excluded module, so that copies and unpickled modules are excluded as well."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = []
        for param in params:
            self._params.append(weakref.ref(param))
            _excluded[param] = True

    def __reduce__(self) -> tuple[Any, ...]:
        alive = [param for ref in self._params if (param := ref()) is not None]
        return Exclusion, (alive,)


def is_excluded(param: Tensor) -> bool:
    """Whether the backend must leave the head with this very weight as it is."""
    return param in _excluded
