"""What each point's ranked labels earn: hits, discounted gains, propensity-weighted gains.

Everything here is per point, so that sums, means, and the resampling of points are the caller's.
Shapes: N points, K ranks kept, M labels in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmo_compile.errors import InputError
from elmo_compile.metrics.targets import SparseTargets


class Gains(NamedTuple):
    """What a ranking earned and the most that any ranking could have, for each of some ks."""

    earned: Tensor
    """float64 [N, len(ks)]."""
    ideal: Tensor
    """float64 [N, len(ks)]; 0 for a point without labels."""


def hits(topk_indices: Any, targets: SparseTargets) -> Tensor:
    """Which ranked labels are right.

    Args:
        topk_indices: [N, K] integer labels, best first; -1 where fewer than K were predicted.
        targets: labels of the same N points.

    Returns:
        bool [N, K].

    Raises:
        InputError: not [N, K] integers, another N than the targets', or a label ranked twice.
    """
    top_NK = _ranked(topk_indices, targets)
    if top_NK.numel() == 0 or targets.indices.numel() == 0:
        return torch.zeros(top_NK.shape, dtype=torch.bool)
    width = max(int(targets.indices.max()), int(top_NK.max())) + 1
    points = torch.arange(top_NK.shape[0])[:, None]
    right = torch.isin(points * width + top_NK, targets.rows() * width + targets.indices)
    return right & (top_NK >= 0)


def discounted_gains(hits_NK: Tensor, targets: SparseTargets, ks: Sequence[int]) -> Gains:
    """`DCG@k = sum over r <= k of hit_r / log2(r + 1)`, and its best: min(k, labels) leading hits.

    Args:
        hits_NK: bool [N, K] from `hits`.
        targets: labels of the same points.
        ks: ranks, each from 1 to K.
    """
    _check_ks(ks, hits_NK.shape[1])
    discount_K = torch.log2(torch.arange(2, hits_NK.shape[1] + 2, dtype=torch.float64)).reciprocal()
    gained_NK = (hits_NK.double() * discount_K).cumsum(1)
    best_K = torch.cat([discount_K.new_zeros(1), discount_K.cumsum(0)])
    counts_N = targets.distinct().counts()
    columns = torch.tensor(ks) - 1
    return Gains(gained_NK[:, columns], best_K[torch.minimum(counts_N[:, None], columns + 1)])


def propensity_gains(
    topk_indices: Any, targets: SparseTargets, inverse_propensity: Tensor, ks: Sequence[int]
) -> Gains:
    """Inverse propensities of the right labels among the first k, and of each point's best k.

    `PSP@k` of a corpus is `earned.sum(0) / ideal.sum(0)`: a ratio of sums, not a mean of ratios.

    Args:
        topk_indices: as for `hits`.
        targets: labels of the same points.
        inverse_propensity: [L] of every label, from `inverse_propensity`.
        ks: ranks, each from 1 to K.

    Raises:
        InputError: as `hits`, or a label has no inverse propensity, or one that is negative or not
            finite.
    """
    top_NK, targets = _ranked(topk_indices, targets), targets.distinct()
    _check_ks(ks, top_NK.shape[1])
    inverse_L = inverse_propensity.to(device="cpu", dtype=torch.float64)
    largest = max([int(t.max()) for t in (top_NK, targets.indices) if t.numel()], default=-1)
    if largest >= inverse_L.numel():
        raise InputError(
            f"label {largest} has no inverse propensity: {inverse_L.numel()} were given. "
            "Pass one for every label of the head, also for labels never seen in training."
        )
    used_M = inverse_L[targets.indices]
    wrong_M = ~(used_M.isfinite() & (used_M >= 0))
    if wrong_M.any():
        label = int(targets.indices[wrong_M][0])
        raise InputError(
            f"the inverse propensity of label {label} is {float(inverse_L[label]):g}; they must be "
            "finite and at least 0."
        )
    gained_NK = torch.where(hits(top_NK, targets), inverse_L[top_NK.clamp_min(0)], 0).cumsum(1)
    return Gains(gained_NK[:, torch.tensor(ks) - 1], _best_sums(targets, inverse_L, ks))


def _best_sums(targets: SparseTargets, inverse_L: Tensor, ks: Sequence[int]) -> Tensor:
    """float64 [N, len(ks)], the sum of each point's k largest inverse propensities."""
    values_M, rows_M = inverse_L[targets.indices], targets.rows()
    order = values_M.argsort(descending=True)
    order = order[rows_M[order].argsort(stable=True)]
    rank_M = torch.arange(len(order)) - targets.indptr[:-1][rows_M]
    sums = torch.zeros(targets.num_points, len(ks), dtype=torch.float64)
    for column, k in enumerate(ks):
        sums[:, column].index_add_(0, rows_M, torch.where(rank_M < k, values_M[order], 0))
    return sums


def _ranked(topk_indices: Any, targets: SparseTargets) -> Tensor:
    """The ranking as int64 [N, K] on the CPU, checked."""
    top_NK = torch.as_tensor(topk_indices)
    if top_NK.dim() != 2 or top_NK.is_floating_point() or top_NK.dtype == torch.bool:
        raise InputError(
            f"topk_indices must be integers [N, K]; got {top_NK.dtype} of shape "
            f"{list(top_NK.shape)}. Pass the indices of a top-k, not its values."
        )
    top_NK = top_NK.to(device="cpu", dtype=torch.int64)
    if top_NK.shape[0] != targets.num_points:
        raise InputError(
            f"{top_NK.shape[0]} points were ranked and {targets.num_points} have targets. "
            "Pass the same points, in the same order."
        )
    if top_NK.numel() and int(top_NK.min()) < -1:
        raise InputError(f"ranked labels must be -1 (nothing) or more; got {int(top_NK.min())}.")
    in_order = top_NK.sort(dim=1).values
    twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(1)
    if bool(twice.any()):
        point = int(twice.nonzero()[0])
        raise InputError(
            f"point {point} has a label ranked twice: {top_NK[point].tolist()}. "
            "A label can be right only once."
        )
    return top_NK


def _check_ks(ks: Sequence[int], kept: int) -> None:
    if not ks or not all(1 <= k <= kept for k in ks):
        raise InputError(
            f"every k must lie between 1 and the {kept} ranks given; got {list(ks)}. "
            "Ask the top-k for at least as many labels as the largest k."
        )
