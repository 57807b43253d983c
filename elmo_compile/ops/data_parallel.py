"""The DistributedDataParallel wrapper that a call of a head belongs to.

DDP tells what runs inside its forward. What runs later still belongs to it: a loss of logits that
were made there, and what a checkpoint runs again in the backward.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from elmo_compile.errors import FusedUpdateError
from elmo_compile.ops.second_pass import current_task

_local = threading.local()
_last: MutableMapping[Tensor, weakref.ref[Any]] = WeakIdKeyDictionary()
_ignored: MutableMapping[Tensor, Any] = WeakIdKeyDictionary()
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_wrappers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_next_number = itertools.count(1)


def active_wrapper() -> Any:
    """The wrapper whose forward is running, or was for what `inside` is around; None without."""
    later = getattr(_local, "wrapper", None)
    if later is not None or not dist.is_available():
        return later
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def inside(wrapper: Any) -> Iterator[None]:
    """Around what belongs to a forward of `wrapper` that has returned (None: to none)."""
    before = getattr(_local, "wrapper", None)
    _local.wrapper = wrapper
    try:
        yield
    finally:
        _local.wrapper = before


def wrapper_of(weight: Tensor) -> Any:
    """The wrapper that a call of this head belongs to, or None.

    A checkpoint runs a forward again in the backward, where DDP is not active any more: it belongs
    to the wrapper that the weight was last used in.
    """
    wrapper = active_wrapper()
    if wrapper is not None:
        _last[weight] = weakref.ref(wrapper)
    elif current_task() != -1 and weight in _last:
        wrapper = _last[weight]()
    return wrapper


def number_of(wrapper: Any) -> int:
    """A number for a wrapper, which a call's handle can hold; 0 for None.

    Raises:
        FusedUpdateError: in its `join()`, where a process may stop taking part in steps.
    """
    if wrapper is None:
        return 0
    join = getattr(wrapper, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise FusedUpdateError(
            "a head that ignore_heads() keeps out of DistributedDataParallel is updated by all "
            "processes together in opt.step(), which those that run out of data under join() do "
            "not call: the others would wait for them forever. Use "
            "join(throw_on_early_termination=True), or give all processes as many batches, or "
            "construct the optimizer with fused=False and do not call ignore_heads()"
        )
    if wrapper not in _numbers:
        _numbers[wrapper] = next(_next_number)
        _wrappers[_numbers[wrapper]] = wrapper
    return _numbers[wrapper]


def group_of(number: int) -> Any:
    """The process group of a numbered wrapper; None for 0.

    Raises:
        FusedUpdateError: the wrapper is gone.
    """
    if not number:
        return None
    wrapper = _wrappers.get(number)
    if wrapper is None:
        raise FusedUpdateError(
            "the DistributedDataParallel module of a forward was deleted before its backward; keep "
            "it until then"
        )
    return wrapper.process_group


def refuse_gradient(weight: Tensor, group: Any = None) -> None:
    """Let a backward raise FusedUpdateError if it puts a gradient into this ignored weight's
    `.grad`: nobody would reduce it over the processes.

    Args:
        group: the process group of the wrapper to come; None: the default one.
    """
    _ignored[weight] = group
    if weight.requires_grad and _refuse not in _hooks(weight):
        weight.register_post_accumulate_grad_hook(_refuse)  # type: ignore[no-untyped-call]


def group_of_ignored(weight: Tensor) -> Any:
    """The process group that an ignored weight is to be trained in; None for any other weight."""
    if weight not in _ignored or not dist.is_available() or not dist.is_initialized():
        return None
    group = _ignored[weight]
    return dist.group.WORLD if group is None else group


def hooked(weight: Tensor) -> bool:
    """Whether a gradient of this weight is to be seen by hooks that are not `refuse_gradient`'s."""
    return bool(weight._backward_hooks) or any(hook is not _refuse for hook in _hooks(weight))


def _hooks(weight: Tensor) -> list[Any]:
    return list((getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values())


def _refuse(weight: Tensor) -> None:
    if weight.grad is None:  # A fused backward: autograd went through the node without a gradient.
        return
    wrapper = wrapper_of(weight)
    group = None if wrapper is None else wrapper.process_group
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    raise FusedUpdateError(
        f"a head weight of shape {tuple(weight.shape)} that ignore_heads() keeps out of "
        "DistributedDataParallel got an ordinary gradient, which nobody reduces: the processes' "
        "weights would differ. Train it by an elmo_compile optimizer with update_at='step' "
        "(fused, and called by a compiled model that finds the head: see "
        "elmo_compile.last_report()), or do not call ignore_heads(). Clear the gradients"
    )
