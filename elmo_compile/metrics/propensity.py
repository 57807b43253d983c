"""Propensities of labels: how likely a label that applies is to have been written down."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from elmo_compile.errors import InputError, OptionError

PropensityModel = Literal["wikipedia", "amazon", "default"]

PRESETS: dict[PropensityModel, tuple[float, float]] = {
    "wikipedia": (0.5, 0.4),
    "amazon": (0.6, 2.6),
    "default": (0.55, 1.5),
}
"""(A, B) as published for the Wikipedia and Amazon data sets, and for all others."""


def inverse_propensity(
    label_counts: Any,
    num_points: int,
    *,
    model: PropensityModel | tuple[float, float] = "default",
) -> Tensor:
    """`1 / p_l = 1 + (ln N - 1) (B + 1)^A (N_l + B)^-A` for every label l.

    Args:
        label_counts: [L] training points that have each label, N_l.
        num_points: training points, N; at least 1.
        model: a name in `PRESETS`, or (A, B) themselves.

    Returns:
        float64 [L].

    Raises:
        InputError: the counts are not a vector of N_l from 0 to N, or N is below 1.
        OptionError: the model is unknown, or not two finite numbers with B above -1 (above 0 where
            a label has no point).

    Source: Jain, Prabhu, Varma, "Extreme Multi-label Loss Functions for Recommendation, Tagging,
    Ranking & Other Missing Label Applications", KDD 2016, section 4.
    """
    a, b = _constants(model)
    counts = torch.as_tensor(label_counts).to(device="cpu", dtype=torch.float64)
    if num_points < 1:
        raise InputError(f"num_points must be at least 1; got {num_points}.")
    if counts.dim() != 1:
        raise InputError(f"label_counts must be a vector [L]; got shape {list(counts.shape)}.")
    if counts.numel() and not 0 <= float(counts.min()) <= float(counts.max()) <= num_points:
        raise InputError(
            f"label_counts must lie between 0 and num_points, {num_points}; they go from "
            f"{float(counts.min()):g} to {float(counts.max()):g}. Count points, not repeats, "
            "and pass the training set's number of points."
        )
    if counts.numel() and float(counts.min()) + b <= 0:
        raise OptionError(
            f"B={b:g} gives labels with {float(counts.min()):g} points no propensity: "
            "(N_l + B)^-A is not finite; take B above 0."
        )
    scale: float = (math.log(num_points) - 1) * (b + 1) ** a
    return 1 + scale * (counts + b).pow(-a)


def _constants(model: PropensityModel | tuple[float, float]) -> tuple[float, float]:
    if isinstance(model, str):
        if model not in PRESETS:
            names = ", ".join(get_args(PropensityModel))
            raise OptionError(
                f"unknown propensity model {model!r}; accepted: {names}, or a pair (A, B)."
            )
        return PRESETS[model]
    try:
        a, b = (float(value) for value in model)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"a propensity model is a name or a pair (A, B) of numbers; got {model!r}."
        ) from error
    if not (math.isfinite(a) and math.isfinite(b) and b > -1):
        raise OptionError(f"A and B must be finite and B above -1; got A={a:g}, B={b:g}.")
    return a, b
