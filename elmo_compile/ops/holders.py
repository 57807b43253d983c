"""Whether a Parameter still belongs to a module, which knows its parameters but not conversely."""

from __future__ import annotations

import gc
from typing import Any

from torch import Tensor, nn


def in_a_module(param: Tensor) -> bool:
    """Whether some live module has `param` as a parameter of its own. Takes tens of milliseconds.

    An optimizer's or a user's references do not count.
    """
    holders = [holder for holder in gc.get_referrers(param) if isinstance(holder, dict)]
    return any(_is_of_a_module(holder) for holder in holders)


def _is_of_a_module(parameters: dict[Any, Any]) -> bool:
    for holder in gc.get_referrers(parameters):
        # A module's attributes are a dict of their own, or part of the module.
        found = holder.__dict__ if isinstance(holder, nn.Module) else holder
        if isinstance(found, dict) and found.get("_parameters") is parameters:
            return True
    return False
