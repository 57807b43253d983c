"""Checking an optimizer's hyper-parameters before anything is registered."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import OptionError
from elmo_compile.optim.state import DTYPES

HOW = ("fused", "update_at", "accumulate", "micro_batches", "max_norm", "nonfinite", "capturable")
"""Entries of a group that say how to update, not by how much: they stay as constructed."""
ROUNDINGS = ("stochastic", "nearest", "kahan")
ACCUMULATE = ("error", "stash", "step_each", "materialize")


def number(name: str, value: Any, *, low: float = 0.0, below: float = math.inf) -> None:
    """Raise OptionError unless `low <= value < below` and value is a finite real number."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise OptionError(f"{name}={value!r}; accepted: a finite number of at least {low:g}{limit}")


def choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Raise OptionError unless value is one of `accepted`."""
    known = any(value is a or (type(value) is type(a) and value == a) for a in accepted)
    if not known:
        raise OptionError(f"{name}={value!r}; accepted: {', '.join(map(repr, accepted))}")


def integer(name: str, value: Any, bits: int, low: int = 0) -> None:
    """Raise OptionError unless value is an int in [low, 2^bits)."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**bits:
        raise OptionError(f"{name}={value!r}; accepted: an int in [{low}, 2**{bits})")


def betas(value: Any) -> None:
    """Raise OptionError unless value is a pair of numbers in [0, 1)."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise OptionError(f"betas={value!r}; accepted: two numbers in [0, 1)")
    for i, beta in enumerate(value):
        number(f"betas[{i}]", beta, below=1.0)


ELSEWHERE = {
    "amsgrad": "torch.optim.AdamW",
    "maximize": "the negative loss",
    "dampening": "torch.optim.SGD",
    "differentiable": "torch.optim",
    "foreach": "nothing: parameters that are alike are updated in one launch",
    "lr_decay": "torch.optim.lr_scheduler",
}
"""Options of torch.optim that mean nothing here, and what to use."""


def check_names(group: dict[str, Any]) -> None:
    """Raise OptionError for an option of torch.optim that would be silently ignored."""
    for name, instead in ELSEWHERE.items():
        if group.get(name):
            raise OptionError(f"{name}={group[name]!r} is not an option here; use {instead}")


def check_group(group: dict[str, Any]) -> None:
    """Raise OptionError for a hyper-parameter that is out of range."""
    lr = group["lr"]
    number("lr", lr.item() if isinstance(lr, Tensor) else lr)
    number("weight_decay", group["weight_decay"])
    choice("rounding", group["rounding"], ROUNDINGS)
    choice("fused", group["fused"], (True, False))
    choice("capturable", group["capturable"], (True, False))
    integer("seed", group["seed"], 32)
    if "momentum" in group:
        number("momentum", group["momentum"], below=1.0)
        choice("nesterov", group["nesterov"], (True, False))
        if group["nesterov"] and not group["momentum"]:
            raise OptionError("nesterov=True needs momentum above 0")
    if "betas" in group:
        betas(group["betas"])
    if "eps" in group:
        number("eps", group["eps"])
    _check_storage(group)
    check_whole_gradient(group)


def _check_storage(group: dict[str, Any]) -> None:
    """State dtypes, compensation and ECO."""
    if "state_dtype" in group:
        accepted = tuple(DTYPES)
        if not isinstance(group["state_dtype"], str | torch.dtype | None):
            raise OptionError(f"state_dtype={group['state_dtype']!r}; accepted: {accepted}")
        choice("state_dtype", group["state_dtype"], accepted)
        if group["state_dtype"] == "8bit":
            _need_torchao()
    accepted_dtypes = (torch.bfloat16, torch.float8_e5m2)
    choice("compensation_dtype", group["compensation_dtype"], accepted_dtypes)
    if "eco" not in group:
        return
    choice("eco", group["eco"], (True, False))
    if not group["eco"]:
        return
    why = "eco=True puts the rounding error of the weight into the momentum"
    if not (group["betas"][0] if "betas" in group else group["momentum"]):
        name = "betas[0]" if "betas" in group else "momentum"
        raise OptionError(f"{why}, which needs {name} above 0")
    if group.get("nesterov"):
        raise OptionError(f"{why}; with nesterov=True it would be applied twice. Use one of them")
    if group["rounding"] == "kahan" or group["kahan_rows"] is not None:
        raise OptionError(f"{why}; rounding='kahan' keeps it elsewhere. Use one of them")


def _need_torchao() -> None:
    try:
        import torchao.optim.quant_utils  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"state_dtype='8bit' stores torchao's block-wise format: pip install torchao ({error})"
        ) from error


def owns_heads(group: dict[str, Any]) -> bool:
    """Whether matrices of a group are updated by their heads."""
    return bool(group["fused"]) and group["accumulate"] != "materialize"


def check_whole_gradient(group: dict[str, Any]) -> None:
    """What must see the whole gradient needs `update_at="step"`, or a gradient that exists."""
    choice("update_at", group["update_at"], ("backward", "step"))
    choice("accumulate", group["accumulate"], ACCUMULATE)
    choice("nonfinite", group["nonfinite"], ("error", "skip"))
    integer("micro_batches", group["micro_batches"], 31, low=1)
    if group["max_norm"] is not None:
        number("max_norm", group["max_norm"])
    if not owns_heads(group):
        return
    if group["update_at"] == "step":
        if group["accumulate"] == "step_each":
            raise OptionError(
                "accumulate='step_each' updates in every backward(), update_at='step' in none; "
                "use accumulate='stash' with update_at='step'"
            )
        return
    why = (
        "the head is updated inside backward(), before the whole gradient is known; pass "
        "update_at='step' (one more matrix product), or fused=False"
    )
    if group["max_norm"] is not None:
        raise OptionError(f"max_norm={group['max_norm']!r} with update_at='backward': {why}")
    if group["nonfinite"] == "skip":
        raise OptionError(f"nonfinite='skip' with update_at='backward': {why}")
    if group["accumulate"] == "stash":
        raise OptionError(f"accumulate='stash' with update_at='backward': {why}")
    if (
        group["accumulate"] == "step_each"
        and not scales_with_gradient(group)
        and group["micro_batches"] == 1
    ):
        raise OptionError(
            "accumulate='step_each' with a rule whose step does not scale with the gradient needs "
            "micro_batches=, how many backward() calls make one step: each uses lr / micro_batches"
        )


def scales_with_gradient(group: dict[str, Any]) -> bool:
    """Whether the rule's step scales with the gradient (SGD's)."""
    return "momentum" in group
