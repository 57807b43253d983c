"""Checking an optimizer's hyper-parameters before anything is registered."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from elmo_compile.errors import OptionError


def number(name: str, value: Any, *, low: float = 0.0, below: float = math.inf) -> None:
    """Raise OptionError unless `low <= value < below` and value is a finite real number."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise OptionError(f"{name}={value!r}; accepted: a finite number of at least {low:g}{limit}")


def choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Raise OptionError unless value is one of `accepted`."""
    if value not in accepted or isinstance(value, bool) != isinstance(accepted[0], bool):
        raise OptionError(f"{name}={value!r}; accepted: {', '.join(map(repr, accepted))}")


def integer(name: str, value: Any, bits: int) -> None:
    """Raise OptionError unless value is an int in [0, 2^bits)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**bits:
        raise OptionError(f"{name}={value!r}; accepted: an int in [0, 2**{bits})")


WHOLE_GRADIENT = {
    "update_at": ("backward", "the second pass of update_at='step' is not in this version"),
    "accumulate": (
        "error",
        "accumulating needs update_at='step', which is not in this version; with fused=False "
        "gradients accumulate as usual",
    ),
    "max_norm": (
        None,
        "clipping must see the whole gradient, which needs update_at='step', not in this version; "
        "with fused=False use torch.nn.utils.clip_grad_norm_",
    ),
    "nonfinite": (
        "error",
        "skipping a step must see the whole gradient, which needs update_at='step', not in this "
        "version; with fused=False check the gradients yourself",
    ),
}
"""Options that must see the whole gradient: what is accepted now, and why nothing else is."""


def whole_gradient(options: dict[str, Any]) -> None:
    """Raise OptionError for an option that `update_at="backward"` cannot honour."""
    for name, (accepted, why) in WHOLE_GRADIENT.items():
        if options[name] != accepted:
            raise OptionError(f"{name}={options[name]!r}; accepted: {accepted!r}: {why}")


def check_group(group: dict[str, Any]) -> None:
    """Raise OptionError for a hyper-parameter that is out of range."""
    lr = group["lr"]
    number("lr", lr.item() if isinstance(lr, Tensor) else lr)
    number("momentum", group["momentum"], below=1.0)
    number("weight_decay", group["weight_decay"])
    choice("nesterov", group["nesterov"], (True, False))
    if group["nesterov"] and not group["momentum"]:
        raise OptionError("nesterov=True needs momentum above 0")
    choice("rounding", group["rounding"], ("stochastic", "nearest"))
    choice("fused", group["fused"], (True, False))
    integer("seed", group["seed"], 32)
    whole_gradient(group)
