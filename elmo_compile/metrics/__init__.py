"""Metrics of extreme classification, fed with top-k indices and sparse labels.

inverse = metrics.inverse_propensity(label_counts, num_points, model="amazon")
scores = metrics.RankingMetrics(ks=(1, 3, 5), inverse_propensity=inverse)
scores.update(elmo.topk(features, weight, 5).indices, metrics.sparse_targets(indptr, indices))
scores.compute()["PSP@5"]
"""

from elmo_compile.metrics.accumulate import RankingMetrics
from elmo_compile.metrics.propensity import PRESETS, PropensityModel, inverse_propensity
from elmo_compile.metrics.ranking import Gains, discounted_gains, hits, propensity_gains
from elmo_compile.metrics.targets import SparseTargets, sparse_targets

__all__ = [
    "PRESETS",
    "Gains",
    "PropensityModel",
    "RankingMetrics",
    "SparseTargets",
    "discounted_gains",
    "hits",
    "inverse_propensity",
    "propensity_gains",
    "sparse_targets",
]
