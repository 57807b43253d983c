"""`elmo::lowp_linear`: a linear layer whose weight is stored in bf16 or fp8.

z = x W^T + b, the weight widened to the features' dtype a chunk of outputs at a time. This is what
a converted head does wherever the pass does not replace it. The weight's gradient is float32.

Autograd casts a gradient to its parameter's dtype, which for fp8 turns it into zeros, so the weight
enters detached and its gradient leaves through a `Carrier`: a float32 view of one zero.
Shapes: x [..., D], weight [L, D], bias [L], z [..., L].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_compile.ops.call import forbid_second_derivative
from elmo_compile.ops.dtensors import carry_shard, is_sharded
from elmo_compile.ops.hidden_gradients import watch

CHUNK_BYTES = 16 * 2**20
"""Widened weight held at once."""


class Carrier(torch.autograd.Function):
    """A float32 stand-in, shaped like the weight, through which its float32 gradient flows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.float32, device=weight.device)
        return zero.expand(weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def carry(weight: Tensor) -> Tensor:
    """The carrier of `weight`, whose `.grad` will be float32 and accumulate as usual."""
    if is_sharded(weight):
        return carry_shard(weight)
    if weight.is_leaf and weight.requires_grad and weight.grad_dtype is not None:
        weight.grad_dtype = None
    watch(weight)
    carrier: Tensor = Carrier.apply(weight)  # type: ignore[no-untyped-call]
    return carrier


def _chunks(weight: Tensor, dtype: torch.dtype) -> range:
    row = max(1, weight.shape[1] * dtype.itemsize)
    return range(0, weight.shape[0], max(1, CHUNK_BYTES // row))


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the features' dtype."""
    z = x.new_empty((*x.shape[:-1], weight.shape[0]))
    steps = _chunks(weight, x.dtype)
    for start in steps:
        rows = slice(start, start + steps.step)
        b = None if bias is None else bias[rows].to(x.dtype)
        z[..., rows] = F.linear(x, weight[rows].to(x.dtype), b)
    return z


def gradients_of(
    g_NL: Tensor, x_ND: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dx in float32 (float64 for float64), dw in `dtype`), empty where not needed."""
    wide = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
    dx = torch.zeros(x_ND.shape if need_dx else (0,), device=x_ND.device, dtype=wide)
    dw = torch.empty(weight.shape if need_dw else (0,), device=x_ND.device, dtype=dtype)
    steps = _chunks(weight, x_ND.dtype)
    for start in steps:
        rows = slice(start, start + steps.step)
        if need_dx:
            dx += g_NL[:, rows] @ weight[rows].to(x_ND.dtype)
        if need_dw:
            dw[rows] = (g_NL[:, rows].t() @ x_ND).to(dtype)
    return dx, dw


@torch.library.custom_op(
    "elmo::lowp_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? carrier) -> Tensor",
)
def lowp_linear(x: Tensor, weight: Tensor, bias: Tensor | None, carrier: Tensor | None) -> Tensor:
    return logits_of(x, weight, bias)


@lowp_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, carrier: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op(
    "elmo::lowp_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
)
def lowp_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    L, D = weight.shape
    g_NL, x_ND = grad.reshape(-1, L), x.reshape(-1, D)
    dx, dw = gradients_of(g_NL, x_ND, weight, need_dx, need_dw, torch.float32)
    return dx.to(x.dtype).view(x.shape) if need_dx else x.new_empty(0), dw


@lowp_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else x.new_empty(0),
        torch.empty(weight.shape if need_dw else (0,), dtype=torch.float32, device=x.device),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_dx, need_w, need_db, need_dw = ctx.needs_input_grad
    if need_w:
        raise RuntimeError(
            "the weight of a converted (bf16 or fp8) head reached autograd as it is, which would "
            "round its gradient to its storage dtype (all zeros in fp8). Compile the model with "
            'torch.compile(model, backend="elmo"), run it eagerly, or restore the head with '
            "elmo_compile.dequantize_head(model)"
        )
    dx, dw = torch.ops.elmo.lowp_linear_backward(grad, x, weight, need_dx, need_dw)
    db = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if need_db else None
    return dx if need_dx else None, None, db, dw if need_dw else None


lowp_linear.register_autograd(_backward, setup_context=_setup)
forbid_second_derivative(lowp_linear_backward)
