"""What is checked of a saved optimizer state before any of it is taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import OptionError
from elmo_compile.numerics.philox import ROUNDING_VERSION
from elmo_compile.optim.state import number_of_rows

_OF_A_RULE = ("betas", "momentum", "eps")
"""Hyper-parameters by which rules differ."""
_MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


def check_groups(saved: Iterable[dict[str, Any]], groups: Iterable[dict[str, Any]]) -> None:
    """Raise OptionError for groups of another package, another rounding or another rule."""
    for theirs, mine in zip(saved, groups):
        version = theirs.get("rounding_version")
        if version is None:
            raise OptionError(
                "this state has no rounding_version, so it is none of elmo_compile.optim "
                "(torch.optim's? moments are kept otherwise there). Begin with a new one"
            )
        if version != ROUNDING_VERSION:
            raise OptionError(
                f"this optimizer state has rounding_version={version!r}; this version of "
                f"elmo_compile continues only rounding_version={ROUNDING_VERSION}"
            )
        for name in _OF_A_RULE:
            if (name in theirs) != (name in mine):
                lacks = "lacks" if name in mine else "has"
                raise OptionError(
                    f"this optimizer state is another rule's: it {lacks} {name}. Load it into an "
                    "optimizer of the class that saved it"
                )


def check_shapes(state_dict: dict[str, Any], groups: Iterable[dict[str, Any]]) -> None:
    """Raise OptionError for state of a parameter of another shape."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in groups for param in group["params"]]
    if len(saved) != len(params):
        return  # torch.optim says so itself.
    for number, (index, param) in enumerate(zip(saved, params)):
        held = state_dict["state"].get(index, {})
        for name, shape in _expected(held, param).items():
            if held[name].shape != shape:
                raise OptionError(
                    f"the saved {name} of parameter {number} has shape "
                    f"{tuple(held[name].shape)}; here it is {tuple(shape)}, of a parameter "
                    f"{tuple(param.shape)}. Was it saved for a model with other labels?"
                )
        rows = held.get("kahan_rows")
        if isinstance(rows, Tensor) and rows.numel() and int(rows.max()) >= param.shape[0]:
            raise OptionError(
                f"the saved kahan_rows of parameter {number} name row {int(rows.max())}; it has "
                f"{param.shape[0]}"
            )


def _expected(held: dict[str, Any], param: Tensor) -> dict[str, torch.Size]:
    """The shape of each saved tensor that has one by its name."""
    shapes = dict.fromkeys(_MOMENTS, param.shape)
    shapes["compensation"] = param.shape
    rows = held.get("kahan_rows")
    if isinstance(rows, Tensor):
        shapes["compensation"] = torch.Size((rows.numel(), *param.shape[1:]))
    shapes["sum"] = torch.Size((number_of_rows(param),))
    return {n: s for n, s in shapes.items() if isinstance(held.get(n), Tensor)}
