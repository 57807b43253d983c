"""Metrics of a whole corpus, fed batch by batch: nothing is kept but sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import InputError, OptionError
from elmo_compile.metrics.ranking import discounted_gains, hits, propensity_gains
from elmo_compile.metrics.targets import SparseTargets, sparse_targets


class RankingMetrics:
    """P@k, nDCG@k, recall@k and, given inverse propensities, PSP@k over all points seen so far.

    With `hit_r` whether a point's label of rank r is right and `|y|` its number of labels:

    - `P@k`: hits among the first k, divided by k; mean over points.
    - `nDCG@k`: `sum_r hit_r / log2(r + 1)` over r <= k, divided by the same sum for min(k, |y|)
      leading hits; mean over points.
    - `R@k`: hits among the first k, divided by |y|; mean over points.
    - `PSP@k`: inverse propensities of the hits among the first k, summed over points, divided by
      the most any ranking could have collected, summed over points.

    A point without labels counts as 0 in the three means and is in neither sum of PSP@k.

    Example:
        >>> metrics = RankingMetrics(ks=(1, 2))
        >>> metrics.update([[3, 1], [0, 2]], SparseTargets.from_rows([[3], [2]]))
        >>> metrics.compute()["P@2"]
        0.5
    """

    def __init__(
        self, *, ks: Sequence[int] = (1, 3, 5), inverse_propensity: Tensor | None = None
    ) -> None:
        """Start with no points.

        Args:
            ks: ranks to report at, ascending, each at least 1.
            inverse_propensity: [L], from `inverse_propensity`; None leaves PSP@k out.

        Raises:
            OptionError: ks is empty, not ascending, or has a value below 1.
        """
        if not ks or list(ks) != sorted(set(ks)) or ks[0] < 1:
            raise OptionError(f"ks must be ascending ranks from 1 on; got {list(ks)}.")
        self.ks = tuple(int(k) for k in ks)
        self.inverse_propensity = inverse_propensity
        self.num_points = 0
        width = len(self.ks)
        self._precision, self._ndcg, self._recall, self._earned, self._ideal = (
            torch.zeros(width, dtype=torch.float64) for _ in range(5)
        )

    def update(self, topk_indices: Any, targets: SparseTargets) -> None:
        """Add a batch.

        Args:
            topk_indices: [N, K] integer labels, best first, K at least the largest k; -1 where
                fewer were predicted. On any device.
            targets: labels of the same N points.

        Raises:
            InputError: see `ranking.hits` and `ranking.propensity_gains`; nothing was added.
        """
        targets = sparse_targets(*targets).distinct()
        hits_NK = hits(topk_indices, targets)
        gains = discounted_gains(hits_NK, targets, self.ks)
        if self.inverse_propensity is not None:
            scored = propensity_gains(topk_indices, targets, self.inverse_propensity, self.ks)
            self._earned += scored.earned.sum(0)
            self._ideal += scored.ideal.sum(0)
        ks = torch.tensor(self.ks)
        counts_NK = hits_NK.double().cumsum(1)[:, ks - 1]
        self._precision += counts_NK.sum(0) / ks
        self._recall += (counts_NK / targets.counts().clamp_min(1)[:, None]).sum(0)
        self._ndcg += torch.where(gains.ideal > 0, gains.earned / gains.ideal, 0).sum(0)
        self.num_points += targets.num_points

    def merge(self, other: RankingMetrics) -> None:
        """Add the points another accumulator has seen (of another process, for instance).

        Raises:
            InputError: the other has other ks, or only one of the two scores propensities.
        """
        scored = [m.inverse_propensity is not None for m in (self, other)]
        if other.ks != self.ks or scored[0] != scored[1]:
            raise InputError(
                f"only accumulators with equal settings can be merged; ks {self.ks} and "
                f"{other.ks}, propensities {scored[0]} and {scored[1]}."
            )
        self._precision += other._precision
        self._ndcg += other._ndcg
        self._recall += other._recall
        self._earned += other._earned
        self._ideal += other._ideal
        self.num_points += other.num_points

    def compute(self) -> dict[str, float]:
        """Each metric by name (`P@1`, `nDCG@3`, `R@5`, `PSP@1`, ...), between 0 and 1.

        Raises:
            InputError: no points were added.
        """
        if self.num_points == 0:
            raise InputError("no points were added: call update() before compute().")
        columns = {
            "P": self._precision / self.num_points,
            "nDCG": self._ndcg / self.num_points,
            "R": self._recall / self.num_points,
        }
        if self.inverse_propensity is not None:
            columns["PSP"] = torch.where(self._ideal > 0, self._earned / self._ideal, 0)
        return {
            f"{name}@{k}": float(values[column])
            for name, values in columns.items()
            for column, k in enumerate(self.ks)
        }
