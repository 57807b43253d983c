"""`elmo::head_loss`: linear + loss as one functional op with a real weight gradient.

loss = factor * sum_n loss_n(x_n W^T + b), computed over chunks of outputs; backward recomputes a
chunk's logits from the saved features. Nothing of size [N, L] exists unless it was an input.
Shapes: x [N, D], weight [L, D], bias [L], loss scalar or [N].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.numerics.losses import CE, LossSpec
from elmo_compile.ops.call import (
    accumulate_dtype,
    agreed_problem,
    assert_labels,
    forbid_second_derivative,
    loss_pass,
    reduce_rows,
    row_factor,
    row_scale,
)
from elmo_compile.ops.spread import spread_of


@torch.library.custom_op(
    "elmo::head_loss",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? target_aux, "
    "Tensor? carrier, str loss, float scale, SymInt divisor, int chunk, ScalarType compute, "
    "str shard='') -> (Tensor loss, Tensor stats)",
)
def head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_aux: Tensor | None,
    carrier: Tensor | None,
    loss: str,
    scale: float,
    divisor: int,
    chunk: int,
    compute: torch.dtype,
    shard: str = "",
) -> tuple[Tensor, Tensor]:
    spec, spread = LossSpec.decode(loss), spread_of(shard, weight)
    L = spread.num_outputs
    problem = agreed_problem(
        spread, "forward", x, weight, bias, target, target_aux, spec, chunk, compute
    )
    assert_labels(spec, target, target_aux, x.shape[0], L)
    rows_N, stats_2N = loss_pass(problem, spread)
    factor = row_factor(spec, target, L, x.shape[0], scale, divisor)
    return reduce_rows(rows_N, spec, factor), stats_2N


@head_loss.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Any, target: Any, target_aux: Any, carrier: Any, loss: str,
    scale: float, divisor: int, chunk: int, compute: torch.dtype, shard: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_outputs(x, LossSpec.decode(loss), compute)


def fake_outputs(x: Tensor, spec: LossSpec, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of (loss, stats) for features `x`."""
    dtype = accumulate_dtype(compute)
    loss = x.new_empty((x.shape[0],) if spec.reduction == "none" else (), dtype=dtype)
    stats = x.new_empty((2, x.shape[0]) if spec.name == CE else (0,), dtype=dtype)
    return loss, stats


@torch.library.custom_op(
    "elmo::head_loss_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor? target_aux, Tensor stats, str loss, float scale, SymInt divisor, int chunk, "
    "ScalarType compute, bool need_dx, bool need_dw, bool need_db, bool wide_dw, str shard='') "
    "-> (Tensor dx, Tensor dw, Tensor db)",
)
def head_loss_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_aux: Tensor | None,
    stats: Tensor,
    loss: str,
    scale: float,
    divisor: int,
    chunk: int,
    compute: torch.dtype,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    wide_dw: bool,
    shard: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    from elmo_compile import kernels

    spec, spread = LossSpec.decode(loss), spread_of(shard, weight)
    L = spread.num_outputs
    asked = "backward", need_dx, need_dw, need_db
    problem = agreed_problem(
        spread, asked, x, weight, bias, target, target_aux, spec, chunk, compute, wide_dw=wide_dw
    )
    factor = row_factor(spec, target, L, x.shape[0], scale, divisor)
    scale_N = row_scale(grad, spec, target, factor, x.shape[0])
    dx, dw, db, *_ = kernels.select(x.device).backward(
        spread.gathered(problem), *spread.gathered_rows(stats, scale_N),
        need_dx=need_dx, need_dw=need_dw, need_db=need_db,
    )  # fmt: skip
    # One empty tensor each: the outputs of an op may not alias.
    return (
        x.new_empty(0) if dx is None else spread.features(dx).to(x.dtype),
        x.new_empty(0) if dw is None else dw.to(gradient_dtype(weight, wide_dw)),
        x.new_empty(0) if db is None or bias is None else db.to(bias.dtype),
    )


def gradient_dtype(weight: Tensor, wide: bool) -> torch.dtype:
    """The weight's dtype, or float32 where asked for or where one byte cannot hold a gradient."""
    return torch.float32 if wide or weight.element_size() == 1 else weight.dtype


@head_loss_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Any, target_aux: Any,
    stats: Any, loss: str, scale: float, divisor: int, chunk: int, compute: torch.dtype,
    need_dx: bool, need_dw: bool, need_db: bool, wide_dw: bool, shard: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else x.new_empty(0),
        torch.empty(weight.shape, dtype=gradient_dtype(weight, wide_dw), device=x.device)
        if need_dw
        else x.new_empty(0),
        torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
        if need_db and bias is not None
        else x.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, target, target_aux, carrier, *config = inputs
    ctx.save_for_backward(x, weight, bias, target, target_aux, output[1])
    *ctx.config, ctx.shard = config
    ctx.has_carrier = carrier is not None
    ctx.wide = carrier is not None and carrier.dtype != weight.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, target, target_aux, stats = ctx.saved_tensors
    need_dx, need_w, need_db, _, _, need_carrier = ctx.needs_input_grad[:6]
    need_dw = need_carrier if ctx.has_carrier else need_w
    dx, dw, db = torch.ops.elmo.head_loss_backward(
        grad, x, weight, bias, target, target_aux, stats, *ctx.config, need_dx, need_dw, need_db,
        ctx.wide, ctx.shard,
    )  # fmt: skip
    return (
        dx if need_dx else None,
        dw if need_dw and not ctx.has_carrier else None,
        db if need_db else None,
        None,
        None,
        dw if need_dw and ctx.has_carrier else None,
        *(None for _ in (*ctx.config, ctx.shard)),
    )


head_loss.register_autograd(_backward, setup_context=_setup)
forbid_second_derivative(head_loss_backward)
