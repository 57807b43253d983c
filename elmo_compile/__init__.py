"""Train models with 10^5 to 10^7 outputs in the memory of their weights.

`torch.compile(model, backend="elmo")` replaces a huge linear layer and its loss by chunked ops that
never hold the logits; with `elmo_compile.optim` the weight gradient never exists either.
"""

from elmo_compile import distributed, heads, integrations, metrics, optim, testing
from elmo_compile.config import Options
from elmo_compile.deferred.targets import multi_hot
from elmo_compile.errors import (
    ElmoError,
    FusedUpdateError,
    InputError,
    NotRewritten,
    OptionError,
    StaleLogitsError,
)
from elmo_compile.explain import explain
from elmo_compile.heads import convert_head, dequantize_head, exclude
from elmo_compile.numerics.rounding import stochastic_round
from elmo_compile.optim.base import is_fused
from elmo_compile.report.records import Report
from elmo_compile.report.store import last_report, reports
from elmo_compile.topk import TopK, topk

__version__ = "0.1.0"

integrations.register()

__all__ = [
    "ElmoError",
    "FusedUpdateError",
    "InputError",
    "NotRewritten",
    "OptionError",
    "Options",
    "Report",
    "StaleLogitsError",
    "TopK",
    "convert_head",
    "dequantize_head",
    "distributed",
    "exclude",
    "explain",
    "heads",
    "is_fused",
    "last_report",
    "metrics",
    "multi_hot",
    "optim",
    "reports",
    "stochastic_round",
    "testing",
    "topk",
]
