"""Metrics against napkinXC (recorded in oracle.json), by hand, and in batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elmo_compile import metrics
from elmo_compile.errors import InputError, OptionError
from elmo_compile.metrics import RankingMetrics, SparseTargets

ORACLE: dict[str, Any] = json.loads(Path(__file__).with_name("oracle.json").read_text())
KS = tuple(range(1, 7))


def oracle_inverse(model: Any) -> torch.Tensor:
    train = SparseTargets.from_rows(ORACLE["train"])
    counts = torch.bincount(train.indices, minlength=ORACLE["num_labels"])
    return metrics.inverse_propensity(counts, train.num_points, model=model)


@pytest.mark.parametrize("model", ["wikipedia", "amazon", "default"])
def test_inverse_propensity_equals_napkinxc(model: str) -> None:
    expected = torch.tensor(ORACLE["inverse_propensity"][model], dtype=torch.float64)
    torch.testing.assert_close(oracle_inverse(model), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(oracle_inverse(metrics.PRESETS[model]), expected)


@pytest.mark.parametrize("name", ["P", "nDCG", "R", "PSP"])
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_every_metric_equals_napkinxc_in_any_batches(name: str, batch: int) -> None:
    targets = SparseTargets.from_rows(ORACLE["test"])
    scores = RankingMetrics(ks=KS, inverse_propensity=oracle_inverse("default"))
    for start in range(0, targets.num_points, batch):
        stop = min(start + batch, targets.num_points)
        scores.update(ORACLE["ranked"][start:stop], targets.slice(start, stop))
    found = [scores.compute()[f"{name}@{k}"] for k in KS]
    assert found == pytest.approx(ORACLE["scores"][name], rel=1e-12)


def test_by_hand() -> None:
    """Two points: {2} ranked first; {0, 1, 3} with 3 ranked second of 2, 3, 4."""
    inverse = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    scores = RankingMetrics(ks=(1, 3), inverse_propensity=inverse)
    scores.update([[2, 0, 1], [2, 3, 4]], SparseTargets.from_rows([[2], [3, 0, 1]]))
    found = scores.compute()
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert found == pytest.approx(
        {
            "P@1": 1 / 2,
            "P@3": (1 / 3 + 1 / 3) / 2,
            "nDCG@1": 1 / 2,
            "nDCG@3": (1 + (1 / math.log2(3)) / ideal) / 2,
            "R@1": (1 + 0) / 2,
            "R@3": (1 + 1 / 3) / 2,
            "PSP@1": 4 / (4 + 8),
            "PSP@3": (4 + 8) / (4 + 11),
        }
    )


def test_a_point_without_labels_counts_as_zero_in_means_and_not_in_psp() -> None:
    inverse = torch.tensor([2.0, 3.0])
    scores = RankingMetrics(ks=(1,), inverse_propensity=inverse)
    scores.update([[0], [1]], SparseTargets.from_rows([[0], []]))
    assert scores.compute() == {"P@1": 0.5, "nDCG@1": 0.5, "R@1": 0.5, "PSP@1": 1.0}


def test_a_repeated_label_counts_once() -> None:
    repeated = SparseTargets.from_rows([[1, 0, 1, 1]])
    plain = SparseTargets.from_rows([[0, 1]])
    inverse = torch.tensor([2.0, 3.0])
    found = []
    for targets in (repeated, plain):
        scores = RankingMetrics(ks=(1, 2), inverse_propensity=inverse)
        scores.update([[1, 0]], targets)
        found.append(scores.compute())
    assert found[0] == found[1]
    assert found[0]["R@2"] == 1


def test_fewer_predictions_than_ranks_are_misses() -> None:
    scores = RankingMetrics(ks=(1, 2))
    scores.update([[4, -1], [-1, -1]], SparseTargets.from_rows([[4], [0]]))
    assert scores.compute()["P@2"] == 0.25


def test_labels_above_2_to_24_stay_exact() -> None:
    label = 2**24 + 1
    scores = RankingMetrics(ks=(1,))
    scores.update(torch.tensor([[label], [label - 1]]), SparseTargets.from_rows([[label]] * 2))
    assert scores.compute()["P@1"] == 0.5


def test_merge_equals_one_accumulator() -> None:
    targets = SparseTargets.from_rows(ORACLE["test"])
    inverse = oracle_inverse("amazon")
    parts = [RankingMetrics(inverse_propensity=inverse) for _ in range(3)]
    parts[0].update(ORACLE["ranked"], targets)
    for part, (start, stop) in zip(parts[1:], ((0, 13), (13, 40)), strict=True):
        part.update(ORACLE["ranked"][start:stop], targets.slice(start, stop))
    parts[1].merge(parts[2])
    assert parts[1].compute() == pytest.approx(parts[0].compute(), rel=1e-12)
    with pytest.raises(InputError, match="equal settings"):
        parts[0].merge(RankingMetrics())


def test_gains_per_point_are_what_a_bootstrap_resamples() -> None:
    targets = SparseTargets.from_rows(ORACLE["test"])
    inverse = oracle_inverse("default")
    gains = metrics.propensity_gains(ORACLE["ranked"], targets, inverse, KS)
    ratio = gains.earned.sum(0) / gains.ideal.sum(0)
    assert ratio.tolist() == pytest.approx(ORACLE["scores"]["PSP"])


def test_numpy_csr_is_accepted() -> None:
    targets = metrics.sparse_targets(np.array([0, 2, 2], np.int32), np.array([3, 1], np.int32))
    assert metrics.hits(np.array([[1, 2], [3, 1]]), targets).tolist() == [
        [True, False],
        [False, False],
    ]


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 2], [1], "end with the number of indices"),
        ([1, 1], [1], "begin with 0"),
        ([], [], "begin with 0"),
        ([0, 2, 1, 3], [0, 1, 2], "never descend"),
        ([0, 1], [-1], "negative"),
        ([0, 1], [1.0], "integers"),
        ([[0, 1]], [1], "vector of integers"),
    ],
)
def test_bad_targets_are_refused(indptr: Any, indices: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metrics.sparse_targets(indptr, indices)


@pytest.mark.parametrize(
    ("ranked", "message"),
    [
        ([[0.5, 1.0]], "its values"),
        ([0, 1], r"\[N, K\]"),
        ([[0, 1], [1, 0]], "2 points were ranked and 1 have targets"),
        ([[1, 1]], "ranked twice"),
        ([[-2, 1]], "-1"),
        ([[0]], "every k must lie between 1 and the 1"),
        ([[0, 9]], "no inverse propensity"),
    ],
)
def test_bad_rankings_are_refused_and_add_nothing(ranked: Any, message: str) -> None:
    scores = RankingMetrics(ks=(1, 2), inverse_propensity=torch.ones(3))
    scores.update([[0, 1]], SparseTargets.from_rows([[1]]))
    before = scores.compute()
    with pytest.raises(InputError, match=message):
        scores.update(ranked, SparseTargets.from_rows([[1]]))
    assert scores.compute() == before


@pytest.mark.parametrize("ks", [(), (0,), (3, 1), (1, 1)])
def test_bad_ks_are_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="ascending"):
        RankingMetrics(ks=ks)


def test_computing_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no points"):
        RankingMetrics().compute()


@pytest.mark.parametrize("model", ["wiki", (1.0,), ("a", "b"), (0.5, -1.0), (math.nan, 1.0), 3])
def test_bad_propensity_models_are_refused(model: Any) -> None:
    with pytest.raises(OptionError, match=r"model|finite"):
        metrics.inverse_propensity([1, 2], 10, model=model)


@pytest.mark.parametrize(("counts", "points"), [([11], 10), ([-1], 10), ([[1]], 10), ([0], 0)])
def test_bad_counts_are_refused(counts: Any, points: int) -> None:
    with pytest.raises(InputError):
        metrics.inverse_propensity(counts, points)


@pytest.mark.parametrize("b", [-0.5, 0.0])
def test_labels_without_a_point_need_a_propensity(b: float) -> None:
    with pytest.raises(OptionError, match="take B above 0"):
        metrics.inverse_propensity([0, 1, 5], 100, model=(0.5, b))
    assert metrics.inverse_propensity([1, 5], 100, model=(0.5, b)).isfinite().all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_propensities_that_are_no_numbers_are_refused(wrong: float) -> None:
    """They made the score of a perfect ranking 0."""
    scores = RankingMetrics(ks=(1,), inverse_propensity=torch.tensor([wrong, 1.0]))
    with pytest.raises(InputError, match="inverse propensity of label 0"):
        scores.update([[0]], SparseTargets.from_rows([[0]]))
    scores.update([[1]], SparseTargets.from_rows([[1]]))
    assert scores.compute()["PSP@1"] == 1
