"""Who wants to be told before a weight changes: deferred logits that someone still holds.

An update inside a backward says so itself; `torch.optim` says so through its step hook.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary


class Watcher(Protocol):
    """Something made from a weight's present values."""

    def before_change(self) -> None:
        """The weight is about to change."""


_watchers: WeakIdKeyDictionary = WeakIdKeyDictionary()
_hook: Any = None


def watch(weight: Tensor, watcher: Watcher) -> None:
    """Call `watcher.before_change()` before `weight` is next updated, while the watcher lives."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)
    _watchers.setdefault(weight, weakref.WeakSet()).add(watcher)  # type: ignore[no-untyped-call]


def about_to_change(weight: Tensor) -> None:
    """Tell everyone who watches `weight`; each is told once."""
    for watcher in list(_watchers.pop(weight, ())):  # type: ignore[no-untyped-call]
        watcher.before_change()


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not len(_watchers):
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            about_to_change(weight)
