"""What backwards kept on every process, gathered: the mean gradient of a data-parallel step.

Features, targets and row statistics travel (N x D a process), never a weight gradient (L x D). A
header of fixed length goes first. From the headers every process draws the same conclusions: which
collectives follow, or that none does and all raise.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from elmo_compile.errors import FusedUpdateError
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.losses import BCE, Positives
from elmo_compile.ops.collectives import exchange, gather_rows
from elmo_compile.ops.merged import in_one_form, merged, stack_targets, with_targets
from elmo_compile.ops.second_pass import Kept, KeptHead, pairs_are_smaller

_NOTHING, _HEAD, _OTHER, _FAILED = range(4)
_CLASSES, _DENSE, _PAIRS = range(3)
_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
"""Of targets."""


class _Header(NamedTuple):
    """What every process tells all others first."""

    state: int
    """_NOTHING was kept; a _HEAD; _OTHER things, which cannot be gathered; or the step _FAILED."""
    rows: int = 0
    form: int = _CLASSES
    """Of the targets."""
    pairs: int = 0
    """Targets that are not 0: of pairs, and of dense ones of BCE."""
    weighted: int = 0
    """Whether pairs have values."""
    dtype: int = 0
    """Of dense targets: a place in `_DTYPES`."""
    head: int = 0
    """A digest of what must be the same in all: loss, dtypes, shapes."""
    bias: int = 0
    bias_places: int = 0
    """Sums of the bias's bits: integers, so that no order of summation matters."""
    wrong: int = 0


def gathered(
    kept: Sequence[Kept], group: Any, weight: Tensor, *, failed: bool = False
) -> list[Kept]:
    """The kept gradients of all processes of a group, scaled to their mean.

    Collective: every process of the group must call it, if with nothing kept.

    Args:
        failed: this process is to raise an error of its own; all others do then, too.

    Raises:
        FusedUpdateError: in every process: one has something that cannot be gathered, or they do
            not have the same head. Nothing but headers was sent.
    """
    world = dist.get_world_size(group)
    if world == 1:
        return list(kept)
    one = _alone(kept)
    mine = _header(kept, one, failed)
    every = [_Header(*numbers) for numbers in exchange(mine, weight.device, group)]
    if failed:
        return []
    _check(every)
    if all(header.state == _NOTHING for header in every):
        return []
    if any(header.state == _NOTHING for header in every):
        one = _with_template(one, every, group, weight)
    assert one is not None
    one = _agreed_targets(one, every)
    p, rows = one.problem, [header.rows for header in every]
    return [
        KeptHead(
            problem=dataclasses.replace(
                p,
                x_ND=torch.cat(gather_rows(p.x_ND, rows, group)),
                target=_gather_targets(p.target, every, group),
            ),
            stats_2N=torch.cat(gather_rows(one.stats_2N.t(), rows, group)).t().contiguous()
            if one.stats_2N.dim() == 2
            else one.stats_2N,
            scale_N=torch.cat(gather_rows(one.scale_N, rows, group)) / world,
            norm2=None,
            wrong=torch.tensor(any(header.wrong for header in every), device=weight.device),
            task=one.task,
        )
    ]


def largest(t: Tensor, group: Any) -> Tensor:
    """The largest value of all processes of a group, element by element."""
    found = t.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found


def _alone(kept: Sequence[Kept]) -> KeptHead | None:
    """What was kept, if that is one head's loss, however many backwards it took."""
    heads = [one for one in kept if isinstance(one, KeptHead)]
    if not heads or len(heads) != len(kept):
        return None
    found = merged(in_one_form(heads))
    return found[0] if len(found) == 1 and isinstance(found[0], KeptHead) else None


def _header(kept: Sequence[Kept], one: KeptHead | None, failed: bool) -> _Header:
    if failed:
        return _Header(_FAILED)
    if one is None:
        return _Header(_OTHER if kept else _NOTHING)
    p, target = one.problem, one.problem.target
    form, pairs, weighted, dtype = _CLASSES, 0, False, 0
    if isinstance(target, Positives):
        form, pairs, weighted = _PAIRS, target.rows_M.numel(), target.values_M is not None
    else:
        dtype = _DTYPES.index(target.dtype)
        if p.loss.targets == "dense":
            form, pairs = _DENSE, int(target.count_nonzero()) if p.loss.name == BCE else 0
    same: Any = (
        p.loss.name, p.loss.ignore_index, p.compute_dtype, p.fp8_features, p.x_ND.dtype,
        one.stats_2N.dtype, one.stats_2N.dim(), one.scale_N.dtype, p.w_LD.dtype,
        tuple(p.w_LD.shape), None if p.b_L is None else p.b_L.dtype,
    )  # fmt: skip
    if p.loss.name != BCE:
        same = *same, form, dtype
    return _Header(
        state=_HEAD, rows=p.x_ND.shape[0], form=form, pairs=pairs, weighted=int(weighted),
        dtype=dtype, head=zlib.crc32(repr(same).encode()),
        **dict(zip(("bias", "bias_places"), _bias_sums(p))), wrong=int(one.wrong),
    )  # fmt: skip


def _bias_sums(p: HeadProblem) -> list[int]:
    if p.b_L is None:
        return [0, 0]
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = p.b_L.contiguous().view(words[p.b_L.element_size()]).to(torch.int64)
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    found: list[int] = torch.stack([bits.sum(), (bits * places).sum()]).tolist()
    return found


def _check(every: Sequence[_Header]) -> None:
    """Raise FusedUpdateError for what cannot be gathered: in all processes, or in none."""
    if any(header.state == _FAILED for header in every):
        which = [rank for rank, header in enumerate(every) if header.state == _FAILED]
        raise FusedUpdateError(
            f"opt.step() was refused in process {which[0]}, which says why; nothing was updated in "
            "the others, which would have to go on without it"
        )
    if any(header.state == _OTHER for header in every):
        raise FusedUpdateError(
            "under DistributedDataParallel update_at='step' gathers the features and targets of "
            "one binary or softmax cross entropy a head; this one has another loss, several, or a "
            "dense gradient as well. Construct the optimizer with fused=False"
        )
    heads = [header for header in every if header.state == _HEAD]
    if len({header.head for header in heads}) > 1:
        raise FusedUpdateError(
            "under DistributedDataParallel a head must have the same loss, dtypes (features, bias, "
            "autocast) and shape in every process. Make them the same, or construct the optimizer "
            "with fused=False"
        )
    if len({(header.bias, header.bias_places) for header in heads}) > 1:
        raise FusedUpdateError(
            "under DistributedDataParallel a head's bias must be the same in every process: what "
            "differs from batch to batch cannot be gathered. Construct the optimizer with "
            "fused=False"
        )


def _with_template(
    one: KeptHead | None, every: Sequence[_Header], group: Any, weight: Tensor
) -> KeptHead:
    """What this process kept; or, where that is nothing, no rows of what another one kept."""
    first = next(rank for rank, header in enumerate(every) if header.state == _HEAD)
    template = [None if one is None else _without_rows(one)]
    dist.broadcast_object_list(template, src=dist.get_global_rank(group, first), group=group)
    if one is not None:
        return one
    (found,) = template
    assert found is not None
    return _on(found, weight)


def _without_rows(one: KeptHead) -> KeptHead:
    """The same of no rows, in host memory and without the weight."""
    p = one.problem
    none: Any = p.target
    if isinstance(none, Positives):
        parts: list[Any] = [None if t is None else t[:0].cpu().clone() for t in none]
        none = Positives(*parts)
    else:
        none = none[:0].cpu().clone()
    return KeptHead(
        problem=dataclasses.replace(
            p,
            x_ND=p.x_ND[:0].cpu().clone(),
            w_LD=torch.empty(0, device="cpu"),
            b_L=None if p.b_L is None else p.b_L.cpu(),
            target=none,
        ),
        stats_2N=one.stats_2N[..., :0].cpu().clone(),
        scale_N=one.scale_N[:0].cpu().clone(),
        norm2=None,
        wrong=torch.zeros((), dtype=torch.bool, device="cpu"),
        task=-1,
    )


def _on(one: KeptHead, weight: Tensor) -> KeptHead:
    """What `_without_rows` left, for a weight."""
    p, home = one.problem, weight.device
    target: Any = p.target
    if isinstance(target, Positives):
        parts: list[Any] = [None if t is None else t.to(home) for t in target]
        target = Positives(*parts)
    else:
        target = target.to(home)
    return dataclasses.replace(
        one,
        problem=dataclasses.replace(
            p,
            x_ND=p.x_ND.to(home),
            w_LD=weight,
            b_L=None if p.b_L is None else p.b_L.to(home),
            target=target,
        ),
        stats_2N=one.stats_2N.to(home),
        scale_N=one.scale_N.to(home),
        wrong=one.wrong.to(home),
    )


def _agreed_targets(one: KeptHead, every: Sequence[_Header]) -> KeptHead:
    """The targets in the form and dtype that all processes take: a process chooses by its own."""
    heads = [header for header in every if header.state == _HEAD]
    dense = [_DTYPES[header.dtype] for header in heads if header.form == _DENSE]
    if one.problem.loss.name != BCE or not dense:
        return one
    if len(dense) == len(heads) and len(set(dense)) == 1:
        return with_targets(one, dense[0])
    dtype = functools.reduce(torch.promote_types, dense, torch.float32)
    rows, pairs = sum(header.rows for header in heads), sum(header.pairs for header in heads)
    elements = rows * one.problem.w_LD.shape[0]
    return with_targets(one, None if pairs_are_smaller(pairs, elements, dtype) else dtype)


def _gather_targets(target: Any, every: Sequence[_Header], group: Any) -> Tensor | Positives:
    rows = [header.rows for header in every]
    if not isinstance(target, Positives):
        return torch.cat(gather_rows(target, rows, group))
    pairs = [header.pairs for header in every]
    rows_M, cols_M = (gather_rows(t, pairs, group) for t in target[:2])
    values: list[Any] = [None] * len(every)
    if any(header.weighted or header.form == _DENSE for header in every):
        values_M = target.values_M
        if values_M is None:
            values_M = torch.ones_like(target.cols_M, dtype=torch.float32)
        values = gather_rows(values_M, pairs, group)
    return stack_targets(
        [(Positives(*part), count) for *part, count in zip(rows_M, cols_M, values, rows)]
    )
