"""`elmo::head_loss_at_once`: linear + loss whose forward forms the gradients too.

A reduced loss is a scalar, so its gradients are known up to one factor as soon as its logits are:
three products instead of the four of `elmo::head_loss`, whose backward makes the logits again. The
backward multiplies by the upstream gradient. The weight gradient exists from the forward on.
Shapes: x [N, D], weight [L, D], bias [L], loss scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.numerics.losses import LossSpec
from elmo_compile.ops.call import (
    NO_SECOND_DERIVATIVE,
    accumulate_dtype,
    assert_labels,
    make_problem,
    new_top_rows,
    reduce_rows,
    row_factor,
    row_scale,
)
from elmo_compile.ops.head_loss import gradient_dtype
from elmo_compile.ops.scale import scaled, scaled_small


@torch.library.custom_op(
    "elmo::head_loss_at_once",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? target_aux, "
    "Tensor? carrier, str loss, float scale, SymInt divisor, int chunk, int rows, "
    "ScalarType compute, bool need_dx, bool need_dw, bool need_db) "
    "-> (Tensor loss, Tensor dx, Tensor dw, Tensor db)",
)
def head_loss_at_once(
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
    rows: int,
    compute: torch.dtype,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from elmo_compile import kernels

    spec = LossSpec.decode(loss)
    problem = make_problem(
        x, weight, bias, target, target_aux, spec, chunk, compute, wide_dw=carrier is not None
    )
    assert_labels(spec, target, target_aux, x.shape[0], weight.shape[0])
    factor = row_factor(spec, target, weight.shape[0], x.shape[0], scale, divisor)
    one = torch.ones((), dtype=accumulate_dtype(compute), device=x.device)
    scale_N = row_scale(one, spec, target, factor, x.shape[0])
    made = kernels.select(x.device).loss_and_gradients(
        problem, scale_N, rows, need_dx=need_dx, need_dw=need_dw, need_db=need_db,
        top=new_top_rows(problem),
    )  # fmt: skip
    dw = made.dw_LD
    return (
        reduce_rows(made.rows_N, spec, factor),
        x.new_empty(0) if made.dx_ND is None else made.dx_ND,
        x.new_empty(0) if dw is None else dw.to(gradient_dtype(weight, carrier is not None)),
        x.new_empty(0) if made.db_L is None else made.db_L,
    )


@head_loss_at_once.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Any, target_aux: Any,
    carrier: Tensor | None, loss: str, scale: float, divisor: int, chunk: int, rows: int,
    compute: torch.dtype, need_dx: bool, need_dw: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = accumulate_dtype(compute)
    dw = gradient_dtype(weight, carrier is not None)
    return (
        x.new_empty((), dtype=wide),
        torch.empty(x.shape, dtype=wide, device=x.device) if need_dx else x.new_empty(0),
        torch.empty(weight.shape, dtype=dw, device=x.device) if need_dw else x.new_empty(0),
        torch.empty(bias.shape, dtype=wide, device=x.device)
        if need_db and bias is not None
        else x.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, bias, _, _, carrier, *config = inputs
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype
    ctx.made = config[-3:]
    ctx.has_carrier = carrier is not None
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    dx, dw, db = ctx.saved_tensors
    need_dx, need_w, need_db, _, _, need_carrier = ctx.needs_input_grad[:6]
    need_dw = need_carrier if ctx.has_carrier else need_w
    for needed, made in zip((need_dx, need_dw, need_db), ctx.made, strict=True):
        assert made or not needed, "a gradient is asked for that was not planned"
    x_dtype, bias_dtype = ctx.dtypes
    weight_grad = scaled(dw, grad) if need_dw else None
    return (
        scaled_small(dx, grad).to(x_dtype) if need_dx else None,
        None if ctx.has_carrier else weight_grad,
        scaled_small(db, grad).to(bias_dtype) if need_db else None,
        None,
        None,
        weight_grad if ctx.has_carrier else None,
        *(None for _ in range(9)),
    )


head_loss_at_once.register_autograd(_backward, setup_context=_setup)
