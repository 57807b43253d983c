"""DTensors as the ops see them: this process's part, and a gradient for it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from elmo_compile.ops.collectives import sum_over
from elmo_compile.ops.hidden_gradients import watch

_HEAD = "_elmo_sharded_head"


def is_sharded(t: Any) -> bool:
    """Whether t is a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")  # else there is none
    return tensors is not None and isinstance(t, tensors.DTensor)


def local_of(t: Any) -> Tensor:
    """This process's part of a DTensor, detached, in the same memory; another tensor detached."""
    if not is_sharded(t):
        detached: Tensor = t.detach()
        return detached
    with torch.no_grad():
        found = t.to_local()
    local: Tensor = found.wait() if hasattr(found, "wait") else found
    return local.detach()


def placed_as(t: Any, param: Any) -> Any:
    """A gradient or state of a parameter, with the parameter's placements. Collective where they
    are others."""
    if not is_sharded(t) or not is_sharded(param):
        return t
    same = t.device_mesh == param.device_mesh and t.placements == param.placements
    return t if same else t.redistribute(param.device_mesh, param.placements)


def local_part(t: Any) -> Tensor:
    """This process's part of a DTensor, whose gradient is the DTensor's."""
    found: Tensor = t.to_local()
    return found


def note_head(param: Tensor, *, converted: bool) -> None:
    """Remember that a DTensor [L, D] is the weight of a head that calls the ops of this package.

    Args:
        converted: its gradient is float32 whatever its dtype is.
    """
    # No weak reference: torch moves such parameters by swapping them.
    setattr(param, _HEAD, "converted" if converted else "plain")


def is_head(param: Tensor) -> bool:
    """Whether `note_head` was told of this very Parameter."""
    return hasattr(param, _HEAD)


def sum_over_shards(t: Tensor, param: Tensor) -> Tensor:
    """The sum over the processes that have parts of a parameter; `t` itself for a whole one."""
    if not is_sharded(param):
        return t
    return sum_over(t.clone(), process_group_of(param))


def process_group_of(param: Any) -> Any:
    """The processes that have parts of a DTensor on a mesh of one dimension."""
    return param.device_mesh.get_group()


class _Carrier(torch.autograd.Function):
    """A stand-in for this process's part of a weight, through which its gradient flows."""

    @staticmethod
    def forward(ctx: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        ctx.place = weight.device_mesh, weight.placements, weight.shape, weight.stride()
        ctx.weight, ctx.version = weight, weight._version
        local = local_of(weight)
        return torch.zeros((), dtype=dtype, device=local.device).expand(local.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        if ctx.weight._version != ctx.version:  # which autograd sees of no part of a DTensor
            raise RuntimeError(
                f"the weight {tuple(ctx.weight.shape)} of a sharded head has been modified by an "
                "inplace operation between forward and backward, so its gradients would be taken "
                "at other weights"
            )
        mesh, placements, shape, stride = ctx.place
        grad = DTensor.from_local(
            grads[0], mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return grad, None


def carry_shard(weight: Tensor) -> Tensor:
    """The carrier [R, D] of a sharded weight: float32 where the head was converted."""
    converted = getattr(weight, _HEAD, "plain") == "converted"
    if converted:
        if weight.is_leaf and weight.requires_grad and weight.grad_dtype is not None:
            weight.grad_dtype = None
        watch(weight)
    dtype = torch.float32 if converted else weight.dtype
    carrier: Tensor = _Carrier.apply(weight, dtype)  # type: ignore[no-untyped-call]
    return carrier
