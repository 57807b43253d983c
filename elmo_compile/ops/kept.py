"""What outlives an update of a weight, for deferred logits that someone still holds.

Who wants to know is told before a weight changes: an update inside a backward says so itself,
`torch.optim` says so through its step hook. The largest logits of each row are collected by the
loss pass itself where it runs over the very logits.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

KEPT = 5
"""Largest logits of a row that outlive an update of the weight."""

Tops = dict[int, list[Any]]
"""Address of a weight -> the collected largest logits of each pass over it (`TopRows`)."""


class Watcher(Protocol):
    """Something made from a weight's present values."""

    def before_change(self) -> None:
        """The weight is about to change."""

    def after_change(self) -> None:
        """The weight may have changed in a way that its version does not count."""


_watchers: WeakIdKeyDictionary = WeakIdKeyDictionary()
_hooks: list[Any] = []


def watch(weight: Tensor, watcher: Watcher) -> None:
    """Call `watcher.before_change()` before `weight` is next updated, while the watcher lives."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    _watchers.setdefault(weight, weakref.WeakSet()).add(watcher)  # type: ignore[no-untyped-call]


def about_to_change(weight: Tensor) -> None:
    """Tell everyone who watches `weight`; each is told once."""
    for watcher in list(_watchers.pop(weight, ())):  # type: ignore[no-untyped-call]
        watcher.before_change()


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for watcher in [w for weight in _stepped(optimizer) for w in _watchers[weight]]:
        watcher.before_change()


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """A step that writes through `.data`, or by torch's fused kernels, counts no version: whatever
    was made before it and of a weight with a gradient is of the past."""
    for weight in _stepped(optimizer):
        if weight.grad is not None:
            for watcher in list(_watchers.pop(weight, ())):  # type: ignore[no-untyped-call]
                watcher.after_change()


def _stepped(optimizer: Any) -> list[Tensor]:
    """The watched weights of an optimizer."""
    if not len(_watchers):
        return []
    groups = optimizer.param_groups
    return [weight for group in groups for weight in group["params"] if weight in _watchers]


_local = threading.local()


@contextlib.contextmanager
def collecting(weights: Iterable[Tensor]) -> Iterator[Tops]:
    """Let loss passes over these weights, in this thread, collect each row's largest logits."""
    before = getattr(_local, "tops", None)
    _local.tops = {weight.data_ptr(): [] for weight in weights}
    try:
        yield _local.tops
    finally:
        _local.tops = before


def collector(weight: Tensor) -> list[Any] | None:
    """Where a pass over this weight is to leave what it collects; None if nobody wants it."""
    tops: Tops | None = getattr(_local, "tops", None)
    return None if tops is None else tops.get(weight.data_ptr())
