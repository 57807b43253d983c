"""What backwards kept on every process, gathered: the mean gradient of a data-parallel step.

Features, targets and row statistics travel (N x D a process), never a weight gradient (L x D).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_compile.errors import FusedUpdateError
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.losses import Positives
from elmo_compile.ops.second_pass import Kept, KeptHead, merged, stack_targets


def gathered(kept: Sequence[Kept], group: Any) -> list[Kept]:
    """The kept gradients of all processes of a group, scaled to their mean.

    Raises:
        FusedUpdateError: a loss whose targets cannot be gathered. Nothing was sent.
    """
    world = dist.get_world_size(group)
    if world == 1:
        return list(kept)
    mine = merged(kept)
    if len(mine) != 1 or not isinstance(mine[0], KeptHead):
        raise FusedUpdateError(
            "under DistributedDataParallel update_at='step' gathers the features and targets of "
            "one binary or softmax cross entropy a head; this one has another loss, several, or a "
            "dense gradient as well. Construct the optimizer with fused=False"
        )
    one = mine[0]
    p = one.problem
    _check_bias(p, group)
    rows = _sizes(p.x_ND, group)
    return [
        KeptHead(
            problem=dataclasses.replace(
                p, x_ND=_stack(p.x_ND, group), target=_gather_targets(p.target, rows, group)
            ),
            stats_2N=_stack(one.stats_2N.t(), group).t().contiguous()
            if one.stats_2N.dim() == 2
            else one.stats_2N,
            scale_N=_stack(one.scale_N, group) / world,
            norm2=None,
            wrong=_stack(one.wrong.view(1), group).any(),
            task=one.task,
        )
    ]


def largest(t: Tensor, group: Any) -> Tensor:
    """The largest value of all processes of a group, element by element."""
    found = t.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found


def _check_bias(p: HeadProblem, group: Any) -> None:
    """Raise FusedUpdateError, in every process, unless all have the same bias.

    Sums of its bits are compared: integers, so that no order of summation matters.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=p.x_ND.device)
    if p.b_L is not None:
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = p.b_L.contiguous().view(words[p.b_L.element_size()]).to(torch.int64)
        places = torch.arange(1, bits.numel() + 1, device=bits.device)
        sums = torch.stack([bits.sum(), (bits * places).sum()])
    found = _gather(sums, group)
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise FusedUpdateError(
            "under DistributedDataParallel a head's bias must be the same in every process: what "
            "differs from batch to batch cannot be gathered. Construct the optimizer with "
            "fused=False"
        )


def _gather_targets(target: Any, rows: list[int], group: Any) -> Tensor | Positives:
    if not isinstance(target, Positives):
        return _stack(target, group)
    weighted = target.values_M is not None
    fields = [_gather(t, group) for t in target if t is not None]
    parts = [
        (Positives(*(f[i] for f in fields), *(() if weighted else (None,))), count)
        for i, count in enumerate(rows)
    ]
    return stack_targets(parts)


def _stack(t: Tensor, group: Any) -> Tensor:
    """The tensors of all processes, one below the other."""
    return torch.cat(_gather(t, group))


def _sizes(t: Tensor, group: Any) -> list[int]:
    """The length of every process's tensor."""
    mine = torch.tensor([t.shape[0]], device=t.device)
    sizes = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(size) for size in sizes]


def _gather(t: Tensor, group: Any) -> list[Tensor]:
    """Every process's tensor; lengths may differ. Sent as bytes, so that any dtype may."""
    sizes = _sizes(t, group)
    t = t.contiguous()
    each = math.prod(t.shape[1:]) * t.element_size()
    longest = torch.zeros(max(sizes) * each, dtype=torch.uint8, device=t.device)
    longest[: t.shape[0] * each] = t.reshape(-1).view(torch.uint8)
    received = [torch.empty_like(longest) for _ in sizes]
    dist.all_gather(received, longest, group=group)
    return [
        data[: size * each].view(t.dtype).view(size, *t.shape[1:])
        for data, size in zip(received, sizes)
    ]
