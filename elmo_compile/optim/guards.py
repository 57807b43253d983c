"""What must see a gradient that does not exist is stopped, loudly.

A fused head's weight has no gradient, so clipping by norm would silently leave it out, and a scaled
loss would be applied to it scaled. Two functions of torch are wrapped, once, when the first fused
optimizer is made; both wrappers do nothing unless a fused head is involved.

Private names: `torch.nn.utils.clip_grad._clip_grads_with_norm_`, looked up by `clip_grad_norm_` at
every call, so that `from torch.nn.utils import clip_grad_norm_` is covered too (torch 2.11 to 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from elmo_compile.errors import FusedUpdateError
from elmo_compile.ops.owners import Owner, live_owners, owner_of

_MARK = "_elmo_compile_guard"


def install() -> None:
    """Wrap torch's gradient clipping and GradScaler.scale (idempotent)."""
    _wrap(clip_grad, "_clip_grads_with_norm_", _refuse_clipping)
    _wrap(clip_grad, "clip_grad_value_", _refuse_clipping)
    _wrap(torch.nn.utils, "clip_grad_value_", _refuse_clipping)
    _wrap(torch.amp.GradScaler, "scale", _refuse_scaling)


def _wrap(where: Any, name: str, check: Any) -> None:
    original = getattr(where, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(checked, _MARK, original)
    setattr(where, name, checked)


def fused_owner(param: Tensor) -> Owner | None:
    """The owner of a weight whose update is fused by a compiled graph, or None."""
    owner = owner_of(param)
    return owner if owner is not None and owner.in_use and not owner.superseded else None


def _refuse_clipping(parameters: Any, *args: Any, **kwargs: Any) -> None:
    given: Iterable[Any] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for param in given:
        owner = fused_owner(param) if isinstance(param, Tensor) else None
        if owner is not None:
            raise FusedUpdateError(
                f"gradient clipping was asked for, but the update of the head weight {owner.name} is "
                "fused into backward(): it is applied already and has no gradient to clip. Leave "
                "that parameter out, construct the optimizer with fused=False, or clip inside the "
                "optimizer with max_norm= and update_at='step'"
            )


def _refuse_scaling(self: Any, *args: Any, **kwargs: Any) -> None:
    if not self.is_enabled():
        return
    for owner in live_owners():
        if owner.in_use and not owner.superseded:
            raise FusedUpdateError(
                f"GradScaler would scale the loss of the head weight {owner.name}, whose update is "
                "fused into backward() and cannot be unscaled or skipped. bfloat16 needs no "
                "GradScaler; otherwise construct the optimizer with fused=False, or use "
                "update_at='step'"
            )
