"""Several backwards of one head as one: their rows stacked, their targets in one form.

Shapes: N rows, D features, L outputs, M pairs of a row and a label.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.numerics.losses import BCE, Positives
from elmo_compile.ops.second_pass import Kept, KeptHead, pairs_are_smaller


def with_targets(one: KeptHead, dtype: torch.dtype | None) -> KeptHead:
    """The same with BCE's targets as a dense matrix of `dtype`, or as pairs (None)."""
    p, target = one.problem, one.problem.target
    if dtype is None and not isinstance(target, Positives):
        cols_M, rows_M = target.t().nonzero(as_tuple=True)
        target = Positives(rows_M, cols_M, target[rows_M, cols_M].to(torch.float32))
    elif dtype is not None and isinstance(target, Positives):
        rows_M, cols_M, values_M = target
        shape = p.x_ND.shape[0], p.w_LD.shape[0] + 1  # what is to be skipped is in the last column
        dense = torch.zeros(shape, dtype=dtype, device=rows_M.device)
        ones = torch.ones_like(cols_M) if values_M is None else values_M
        target = dense.index_put_((rows_M, cols_M), ones.to(dtype))[:, :-1].contiguous()
    elif dtype is not None and not isinstance(target, Positives):
        target = target.to(dtype)
    loss = dataclasses.replace(p.loss, targets="pairs" if dtype is None else "dense")
    return dataclasses.replace(one, problem=dataclasses.replace(p, target=target, loss=loss))


def in_one_form(kept: Sequence[KeptHead]) -> list[KeptHead]:
    """Backwards of BCE with the same form of targets, which `keep_head` chooses for each alone."""
    dense = [one.problem.target for one in kept if isinstance(one.problem.target, Tensor)]
    if any(one.problem.loss.name != BCE for one in kept) or not 0 < len(dense) < len(kept):
        return list(kept)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in dense), torch.float32)
    pairs = sum(int(t.count_nonzero()) for t in dense)
    pairs += sum(
        one.problem.target.rows_M.numel()
        for one in kept
        if isinstance(one.problem.target, Positives)
    )
    elements = sum(one.problem.x_ND.shape[0] for one in kept) * kept[0].problem.w_LD.shape[0]
    wanted = None if pairs_are_smaller(pairs, elements, dtype) else dtype
    return [with_targets(one, wanted) for one in kept]


def merged(kept: Sequence[Kept]) -> list[Kept]:
    """Several backwards through the same weight as few: their rows stacked where that can be."""
    groups: list[list[KeptHead]] = []
    rest: list[Kept] = []
    for one in kept:
        if not isinstance(one, KeptHead):
            rest.append(one)
            continue
        fitting = [group for group in groups if group[0].merges_with(one)]
        if fitting:
            fitting[0].append(one)
        else:
            groups.append([one])
    return [*(_stacked(group) for group in groups), *rest]


def _stacked(kept: list[KeptHead]) -> KeptHead:
    if len(kept) == 1:
        return kept[0]
    problems = [one.problem for one in kept]
    return KeptHead(
        problem=dataclasses.replace(
            problems[0],
            x_ND=torch.cat([p.x_ND for p in problems]),
            target=stack_targets([(p.target, p.x_ND.shape[0]) for p in problems]),
            chunk=min(p.chunk for p in problems),
        ),
        stats_2N=torch.cat([one.stats_2N for one in kept], -1),
        scale_N=torch.cat([one.scale_N for one in kept]),
        norm2=None,
        wrong=torch.stack([one.wrong for one in kept]).any(),
        task=kept[-1].task,
    )


def stack_targets(parts: Sequence[tuple[Any, int]]) -> Tensor | Positives:
    """Targets of batches put one below the other.

    Args:
        parts: (targets, rows of the batch).
    """
    if not isinstance(parts[0][0], Positives):
        return torch.cat([target for target, _ in parts])
    first, rows, cols, values = 0, [], [], []
    weighted = any(target.values_M is not None for target, _ in parts)
    for target, count in parts:
        rows.append(target.rows_M + first)
        cols.append(target.cols_M)
        if weighted:
            ones = torch.ones_like(target.cols_M, dtype=torch.float32)
            values.append(ones if target.values_M is None else target.values_M)
        first += count
    cols_M, order = torch.cat(cols).sort(stable=True)
    return Positives(torch.cat(rows)[order], cols_M, torch.cat(values)[order] if weighted else None)
