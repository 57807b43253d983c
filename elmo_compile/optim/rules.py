"""The optimizers: each names its state, its hyper-parameters and the rule that reads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from elmo_compile.numerics.state_size import StateSize
from elmo_compile.numerics.update import Rounding
from elmo_compile.ops.dtensors import is_sharded
from elmo_compile.optim.base import HeadOptimizer
from elmo_compile.optim.sharded import row_sums
from elmo_compile.optim.state import number_of_rows

Accumulate = Literal["error", "stash", "step_each", "materialize"]

_SHARED = """
    In a model compiled with `backend="elmo"`, the weight of a rewritten head is updated by the
    loss's own kernel: its `.grad` stays None. `step()` updates everything else with the same rule,
    and must be called between one backward and the next. All arguments but `params` may be given
    per parameter group. All arithmetic is float32, with one rounding at each store.

    Args:
        params: parameters or parameter groups, as for torch.optim.
        lr: rate, read when the update happens, so schedulers work.{rule}
        rounding: of weights stored in bf16 or fp8. "stochastic"; "nearest"; "kahan": to nearest,
            what is lost being kept in a compensation tensor shaped like the weight. Others are
            stored to nearest.
        kahan_rows: compensate only these rows of the group's largest weight, for the most frequent
            labels: a number (rows from 0 on), a share in (0, 1], row numbers, one count for each
            row (its most frequent 5 %), or (number or share, counts). Other rows are rounded as
            `rounding` says (stochastically for "kahan").
        compensation_dtype: torch.bfloat16 or torch.float8_e5m2, stored stochastically.{state}
        seed: of the rounding, in [0, 2^32).
        fused: False: every parameter gets an ordinary gradient and is updated by `step()`.
        update_at: "backward": heads are updated inside backward(), three matrix products. "step":
            backward() keeps features, targets and row statistics, and `step()` updates from the
            unchanged weight: four products, and what must see the whole gradient works.
        accumulate: several backward() calls before a step. "error"; "stash" (needs
            update_at="step"): exact; "step_each": each backward updates, at lr / micro_batches
            (SGD: at lr, the micro-batch's loss being scaled); "materialize": a real gradient.
        micro_batches: backward() calls in a step, for "step_each".
        max_norm: clip the 2-norm of the gradients of all groups with this max_norm together, fused
            and not, as `clip_grad_norm_` does. Needs update_at="step" where a head is fused.
        nonfinite: "error", or "skip": a step with a gradient that is not finite changes nothing
            and is counted in `skipped_steps`. Needs update_at="step" where a head is fused.

    Raises:
        OptionError: a hyper-parameter is out of range, or not available with these others.
"""
_STATE = """
        state_dtype: of the state shaped like the weight: torch.float32, torch.bfloat16 (stored
            stochastically), "8bit" (block-wise, torchao's format; matrices of 4096 elements or
            more), or None: the weight's dtype, bf16 for fp8 weights.
        eco: add what the rounding of the weight loses to the first moment (no compensation
            tensor): ECO, arXiv 2601.22101."""


def _documented(rule: str, state: str = _STATE) -> Any:
    """Put the shared part of the documentation behind a class's own."""

    def add(cls: type) -> type:
        own, source = (cls.__doc__ or "").split("Source:")
        shared = _SHARED.format(rule=rule, state=state)
        cls.__doc__ = f"{own.rstrip()}\n{shared}\n    Source:{source}"
        return cls

    return add


def _defaults(own: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters for torch.optim from a constructor's locals."""
    return {k: v for k, v in own.items() if k not in ("self", "params", "__class__")}


@_documented(
    """
        momentum: in [0, 1).
        nesterov: needs momentum.
        weight_decay: added to the gradient, at least 0."""
)
class SGD(HeadOptimizer):
    """Stochastic gradient descent that owns huge heads and rounds what it stores.

    `g <- g + weight_decay w; m <- momentum m + g; w <- round(w - lr (m or g))`.

    Source: torch.optim.SGD for the rule; ELMO (arXiv 2510.11168).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        rounding: Rounding = "stochastic",
        kahan_rows: Any = None,
        compensation_dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype | str | None = None,
        eco: bool = False,
        seed: int = 0,
        fused: bool = True,
        update_at: Literal["backward", "step"] = "backward",
        accumulate: Accumulate = "error",
        micro_batches: int = 1,
        max_norm: float | None = None,
        nonfinite: Literal["error", "skip"] = "error",
        capturable: bool = False,
    ) -> None:
        super().__init__(params, _defaults(locals()))

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _rule(self, group: dict[str, Any]) -> dict[str, Any]:
        momentum, nesterov, eco = group["momentum"], group["nesterov"], group["eco"]
        return {"rule": "sgd", "beta1": momentum, "nesterov": nesterov, "eco": eco}


@_documented(
    """
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled: lr weight_decay of the weight is taken off in each step."""
)
class AdamW(HeadOptimizer):
    """Adam with decoupled weight decay that owns huge heads and rounds what it stores.

    `m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g^2; w <- round(w - lr (m / (sqrt(v) + eps) + wd w))`
    with debiased b1, b2, so that m and v are stored bias-corrected.

    Source: torch.optim.AdamW for the rule; optimi for the debiased form.
    """

    _betas: dict[int, tuple[float, ...]]
    """What each group said at its first update, by the number of its first parameter."""
    _told_of_betas = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rounding: Rounding = "stochastic",
        kahan_rows: Any = None,
        compensation_dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype | str | None = None,
        eco: bool = False,
        seed: int = 0,
        fused: bool = True,
        update_at: Literal["backward", "step"] = "backward",
        accumulate: Accumulate = "error",
        micro_batches: int = 1,
        max_norm: float | None = None,
        nonfinite: Literal["error", "skip"] = "error",
        capturable: bool = False,
    ) -> None:
        self._betas = {}
        super().__init__(params, _defaults(locals()))

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _rule(self, group: dict[str, Any]) -> dict[str, Any]:
        self._notice_changed_betas(group)
        (beta1, beta2), eps, eco = group["betas"], group["eps"], group["eco"]
        betas = {"beta1": beta1, "beta2": beta2, "debias": True}
        return {"rule": "adamw", **betas, "eps": eps, "eco": eco}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._betas = {}
        super().__setstate__(state)

    def _notice_changed_betas(self, group: dict[str, Any]) -> None:
        """Warn, once, where a group's betas change in the course of training."""
        now = tuple(group["betas"])
        before = self._betas.setdefault(group["param_ids"][0], now)
        if now != before and not self._told_of_betas:
            self._told_of_betas = True
            warnings.warn(
                f"betas changed from {before} to {now}: from here on this is not "
                "torch.optim.AdamW, since moments are kept bias-corrected by the betas of now. "
                "With OneCycleLR and CyclicLR pass cycle_momentum=False",
                stacklevel=2,
            )


@_documented(
    """
        betas: of the direction and of the moment, each in [0, 1).
        weight_decay: decoupled: lr weight_decay of the weight is taken off in each step.""",
    _STATE[: _STATE.index("\n        eco")],
)
class Lion(HeadOptimizer):
    """Lion: the sign of a moment, for heads and everything else.

    `w <- round(w - lr (sign(b1 m + (1-b1) g) + weight_decay w)); m <- b2 m + (1-b2) g`.

    Source: Chen et al., "Symbolic discovery of optimization algorithms" (arXiv 2302.06675).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        rounding: Rounding = "stochastic",
        kahan_rows: Any = None,
        compensation_dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        fused: bool = True,
        update_at: Literal["backward", "step"] = "backward",
        accumulate: Accumulate = "error",
        micro_batches: int = 1,
        max_norm: float | None = None,
        nonfinite: Literal["error", "skip"] = "error",
        capturable: bool = False,
    ) -> None:
        super().__init__(params, _defaults(locals()))

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _rule(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"rule": "lion", "beta1": beta1, "beta2": beta2}


@_documented(
    """
        eps: added to the root of a row's sum.
        weight_decay: decoupled: lr weight_decay of the weight is taken off in each step.""",
    "",
)
class Adagrad(HeadOptimizer):
    """Row-wise Adagrad: one float32 number a row, the recommender's standard.

    `a <- a + mean_d g^2; w <- round(w - lr (g / (sqrt(a) + eps) + weight_decay w))`; a vector has
    a number for each element. Sparse gradients are accepted.

    Source: Duchi et al. (JMLR 2011); FBGEMM's EXACT_ROWWISE_ADAGRAD for the row-wise form.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        rounding: Rounding = "stochastic",
        kahan_rows: Any = None,
        compensation_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        fused: bool = True,
        update_at: Literal["backward", "step"] = "backward",
        accumulate: Accumulate = "error",
        micro_batches: int = 1,
        max_norm: float | None = None,
        nonfinite: Literal["error", "skip"] = "error",
        capturable: bool = False,
    ) -> None:
        super().__init__(params, _defaults(locals()))

    _row_wise = True

    def _slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def _rule(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"rule": "adagrad", "eps": group["eps"]}

    def _slot_size(self, name: str, param: Tensor, group: dict[str, Any]) -> StateSize:
        dtype = torch.float64 if param.real.dtype == torch.float64 else torch.float32
        return StateSize(name, dtype, Fraction(dtype.itemsize), columns=1)

    def _slot(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        held = self.state[param]
        if name not in held and is_sharded(param):
            held[name] = row_sums(param)
        if name not in held:
            dtype = self._slot_size(name, param, group).dtype
            held[name] = torch.zeros(number_of_rows(param), dtype=dtype, device=param.device)
        held[name] = held[name].to(param.device)
        found: Tensor = held[name]
        return found
