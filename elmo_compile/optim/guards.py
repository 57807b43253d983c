"""What must see a gradient that does not exist is stopped, loudly.

A fused head's weight has no gradient, so clipping by norm would silently leave it out, and a
scaled loss would be applied to it scaled. Functions of torch are wrapped, once, when the first
fused optimizer is made; the wrappers do nothing unless a fused head is involved. With
`update_at="step"` GradScaler works: what a head kept is unscaled and looked at with the gradients;
and a model's `zero_grad()` clears it, as the optimizer's does.

Private names: `torch.nn.utils.clip_grad._clip_grads_with_norm_`, looked up by `clip_grad_norm_` at
every call, so that `from torch.nn.utils import clip_grad_norm_` is covered too, and
`GradScaler._unscale_grads_`, through which every unscaling and every check for infinities goes
(torch 2.11 to 2.15). `clip_grad_value_` and `clip_grads_with_norm_` imported by name before the
first fused optimizer was made are not.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook

from elmo_compile.errors import FusedUpdateError
from elmo_compile.ops.dtensors import is_sharded, local_of
from elmo_compile.ops.fused import ANCHOR_NODE
from elmo_compile.ops.gather import largest
from elmo_compile.ops.owners import live_owners, owner_of
from elmo_compile.optim.sharded import agreed

_MARK = "_elmo_compile_guard"


def install() -> None:
    """Wrap torch's gradient clipping, GradScaler.scale and Module.zero_grad (idempotent)."""
    _wrap(clip_grad, "_clip_grads_with_norm_", _refuse_clipping)
    _wrap(torch.nn.utils, "clip_grads_with_norm_", _refuse_clipping)
    _wrap(clip_grad, "clip_grad_value_", _refuse_clipping)
    _wrap(torch.nn.utils, "clip_grad_value_", _refuse_clipping)
    _wrap(torch.amp.GradScaler, "scale", _refuse_scaling)
    _wrap_unscale()
    _wrap_zero_grad()
    global _step_hook
    if _step_hook is None:
        _step_hook = register_optimizer_step_pre_hook(_notice_other_steps)


_step_hook: Any = None
_OTHER_STEPS = 2
"""Steps of another optimizer that are too many: one may belong to an order of steps."""


def _notice_other_steps(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Warn where another optimizer steps a weight again and again whose owner never steps."""
    waiting = {o.key for o in live_owners() if o.kept or o.pending}
    waiting -= {o.key for o in getattr(optimizer, "_owners", ())}
    if not waiting:
        return
    for param in [p for group in optimizer.param_groups for p in group["params"]]:
        owner = owner_of(param)
        if owner is None or owner.key not in waiting:
            continue
        owner.other_steps += 1
        if owner.other_steps == _OTHER_STEPS:
            warnings.warn(
                f"torch.optim's {type(optimizer).__name__} steps the head weight {owner.name}, but "
                "an elmo_compile optimizer owns it, takes its gradient, and is not stepped: call "
                "that one's step(); or delete it (and the scheduler that holds it) if this one "
                "trains the weight now",
                stacklevel=4,  # step() inside torch's wrapper
            )


def _wrap_zero_grad() -> None:
    original = torch.nn.Module.zero_grad
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def zero_grad(module: torch.nn.Module, set_to_none: bool = True) -> None:
        original(module, set_to_none)
        if any(owner.kept for owner in live_owners()):
            for param in module.parameters():
                owner = owner_of(param)
                if owner is not None:
                    owner.forget_kept()

    setattr(zero_grad, _MARK, original)
    torch.nn.Module.zero_grad = zero_grad  # type: ignore[method-assign, assignment]


def _wrap_unscale() -> None:
    original = torch.amp.GradScaler._unscale_grads_
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def unscale(
        scaler: Any, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        groups = optimizer.param_groups
        sharded = [p.grad for group in groups for p in group["params"] if is_sharded(p.grad)]
        given: Any = _local_gradients(optimizer) if sharded else optimizer
        found = original(scaler, given, inv_scale, found_inf, allow_fp16)
        for device in {grad.device for grad in sharded}:
            found[device].fill_(float(agreed(bool(found[device]), sharded)))
        for owner in getattr(optimizer, "_owners", ()):
            group = owner.shared_with()
            if owner.kept or group is not None:
                device = owner.param.device
                flag = found.setdefault(device, found_inf.to(device, copy=True))
                wrong = [owner.wrong()] if owner.kept else []
                flags = [each.to(flag) for each in (*found.values(), *wrong)]
                flag.copy_(torch.stack(flags).amax())
                if group is not None:
                    # All processes skip a step, or none: a step gathers what they kept.
                    flag.copy_(largest(flag, group))
                for one in owner.kept:
                    one.times_(inv_scale.to(device))
        return found

    setattr(unscale, _MARK, original)
    torch.amp.GradScaler._unscale_grads_ = unscale  # type: ignore[method-assign, assignment]


class _Local(NamedTuple):
    """An optimizer's gradients as `GradScaler` reads them."""

    param_groups: list[dict[str, Any]]


def _local_gradients(optimizer: Any) -> _Local:
    """Gradients as plain tensors, of DTensors this process's part: torch takes no mixture."""
    stands = []
    for param in [p for group in optimizer.param_groups for p in group["params"]]:
        if is_sharded(param.grad):
            grad = local_of(param.grad)
            param = torch.empty_like(grad)
            param.grad = grad
        stands.append(param)
    return _Local([{"params": stands}])


def _wrap(where: Any, name: str, check: Any) -> None:
    original = getattr(where, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if live_owners():
            args, kwargs = check(args, kwargs)
        return original(*args, **kwargs)

    setattr(checked, _MARK, original)
    setattr(where, name, checked)


def _refuse_clipping(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Check the parameters; a generator of them is replaced by what it gave.

    A limit of infinity clips nothing: it is how trainers ask for the norm of what has gradients.
    """
    limit = args[1] if len(args) > 1 else kwargs.get("max_norm", kwargs.get("clip_value"))
    if limit is not None and float(limit) == math.inf:
        return args, kwargs
    given = args[0] if args else kwargs["parameters"]
    params = [given] if isinstance(given, Tensor) else list(given)
    for param in params:
        owner = owner_of(param)
        if owner is None or not owner.in_use or owner.superseded:
            continue
        if owner.pending or owner.kept or param.grad is None:  # otherwise this step was not fused
            raise FusedUpdateError(
                f"gradient clipping was asked for, but the update of the head weight {owner.name} "
                "is fused: there is no gradient to clip. Clip inside the optimizer with max_norm= "
                "and update_at='step', leave that parameter out, or construct the optimizer with "
                "fused=False"
            )
    if args:
        return (params, *args[1:]), kwargs
    return args, {**kwargs, "parameters": params}


def _refuse_scaling(args: Any, kwargs: Any) -> tuple[Any, Any]:
    scaler = args[0] if args else None
    outputs = args[1] if len(args) > 1 else kwargs.get("outputs")
    if scaler is not None and scaler.is_enabled():
        for weight in _anchored(outputs):
            owner = owner_of(weight)
            if owner is not None and owner.policy().at_step:
                continue
            name = owner.name if owner is not None else str(tuple(weight.shape))
            raise FusedUpdateError(
                f"GradScaler would scale the loss of the head weight {name}, whose update is "
                "fused into backward() and cannot be unscaled or skipped. bfloat16 needs no "
                "GradScaler; otherwise construct the optimizer with fused=False, or use "
                "update_at='step'"
            )
    return args, kwargs


def _anchored(outputs: Any) -> Iterator[Tensor]:
    """The weights that a backward from these tensors would update."""
    if not isinstance(outputs, Tensor):
        for item in outputs if isinstance(outputs, Iterable) else ():
            yield from _anchored(item)
        return
    work: list[Any] = [outputs.grad_fn]
    seen: set[Any] = set()
    while work:
        node = work.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == ANCHOR_NODE:
            accumulate: Any = node.next_functions[0][0]
            yield accumulate.variable
        work.extend(parent for parent, _ in node.next_functions)
