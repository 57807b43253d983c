"""`elmo::sharded_linear`: a linear layer whose outputs are spread over processes (`spread`).

z = x W^T + b for this process's rows and all outputs: what a sharded head does wherever the pass
does not replace it. It gathers the features of all processes, multiplies them with this one's part
of the weight, and swaps: [A, R] of each for [N, L]. Collective, the backward too. The gradients of
weight and bias are the mean over processes.

As in `linear`, the gradient of a converted weight leaves through a carrier.
Shapes: x [..., D], weight [R, D], bias [R], z [..., L]; N rows of this process, A of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.ops.call import forbid_second_derivative
from elmo_compile.ops.collectives import gather_rows
from elmo_compile.ops.dtensors import local_part
from elmo_compile.ops.linear import gradients_of, logits_of
from elmo_compile.ops.shards import Agreement, LabelShard


def sharded_head(x: Tensor, weight: Tensor, bias: Tensor | None, shard: str) -> Tensor:
    """A sharded head's call as Dynamo keeps it: one node, which no pass over the graph can divide.

    Args:
        weight, bias: DTensors.
    """
    own = None if bias is None else local_part(bias)
    z: Tensor = torch.ops.elmo.sharded_linear.default(x, local_part(weight), own, None, shard)
    return z


@torch.library.custom_op(
    "elmo::sharded_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? carrier, str shard) -> Tensor",
)
def sharded_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, carrier: Tensor | None, shard: str
) -> Tensor:
    spread = LabelShard.decode(shard)
    x_AD, rows = _of_all(x, weight, spread, "logits")
    z_NL = spread.to_rows(logits_of(x_AD, weight, bias), rows)
    return z_NL.reshape(*x.shape[:-1], spread.num_outputs)


@sharded_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, carrier: Any, shard: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], int(shard.rpartition("/")[2])))


def _of_all(x: Tensor, weight: Tensor, spread: LabelShard, asked: Any) -> tuple[Tensor, list[int]]:
    """The features of all processes, and how many rows each has.

    Args:
        asked: what is called, and for what.
    """
    x_ND = x.reshape(-1, x.shape[-1])
    with Agreement(spread.group, x.device) as agreement:
        agreement.tell(x_ND.shape[0], same=(asked, x.shape[-1], x.dtype, weight.dtype))
    rows = agreement.told(0)
    return torch.cat(gather_rows(x_ND, rows, spread.group)), rows


@torch.library.custom_op(
    "elmo::sharded_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, str shard, bool need_dx, bool need_dw, "
    "bool need_db, ScalarType dw_dtype) -> (Tensor, Tensor, Tensor)",
)
def sharded_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    shard: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    dw_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    spread = LabelShard.decode(shard)
    x_AD, rows = _of_all(x, weight, spread, ("gradients", need_dx, need_dw, need_db))
    g_AR = spread.to_outputs(grad.reshape(-1, grad.shape[-1]), rows)
    dx_AD, dw = gradients_of(g_AR, x_AD, weight, need_dx, need_dw, dw_dtype)
    db = g_AR.sum(0, dtype=dx_AD.dtype) if need_db else dx_AD.new_empty(0)
    dx = x.new_empty(0)
    if need_dx:
        dx = torch.split(spread.sum_(dx_AD), rows)[spread.rank].to(x.dtype, copy=True).view(x.shape)
    return dx, dw.div_(spread.world), db.div_(spread.world)


@sharded_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, shard: str, need_dx: bool, need_dw: bool,
    need_db: bool, dw_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    empty = (0,)
    return (
        torch.empty(x.shape if need_dx else empty, dtype=x.dtype, device=x.device),
        torch.empty(weight.shape if need_dw else empty, dtype=dw_dtype, device=x.device),
        torch.empty(weight.shape[:1] if need_db else empty, dtype=wide, device=x.device),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, carrier, shard = inputs
    ctx.save_for_backward(x, weight)
    ctx.shard = shard
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dw_dtype = weight.dtype if carrier is None else carrier.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_dx, need_w, need_db, need_carrier, _ = ctx.needs_input_grad
    if need_w and weight.dtype.itemsize == 1:
        raise RuntimeError(
            "the weight of a converted (fp8) sharded head reached autograd as it is, which would "
            "round its gradient to its storage dtype (all zeros). Compile the model with "
            'torch.compile(model, backend="elmo"), or run it eagerly'
        )
    dx, dw, db = torch.ops.elmo.sharded_linear_backward(
        grad, x, weight, ctx.shard, need_dx, need_w or need_carrier, need_db, ctx.dw_dtype
    )
    return (
        dx if need_dx else None,
        dw if need_w else None,
        db.to(ctx.bias_dtype) if need_db else None,
        dw if need_carrier else None,
        None,
    )


sharded_linear.register_autograd(_backward, setup_context=_setup)
forbid_second_derivative(sharded_linear_backward)


@torch.library.custom_op(
    "elmo::of_all_outputs", mutates_args=(), schema="(Tensor b, str shard) -> Tensor"
)
def of_all_outputs(b: Tensor, shard: str) -> Tensor:
    """b [L] from each process's part [R]; its gradient is the mean over processes."""
    spread = LabelShard.decode(shard)
    sizes = [last - first for first, last in spread.bounds]
    return torch.cat(gather_rows(b, sizes, spread.group))


@of_all_outputs.register_fake
def _(b: Tensor, shard: str) -> Tensor:
    return b.new_empty(int(shard.rpartition("/")[2]))


@torch.library.custom_op(
    "elmo::of_own_outputs", mutates_args=(), schema="(Tensor g, Tensor b, str shard) -> Tensor"
)
def of_own_outputs(g: Tensor, b: Tensor, shard: str) -> Tensor:
    """The mean over processes of g [L], of this one's outputs [R] and in the dtype of b [R]."""
    spread = LabelShard.decode(shard)
    wide = g.to(torch.float64 if g.dtype == torch.float64 else torch.float32, copy=True)
    mean = spread.sum_(wide)[spread.first : spread.first + spread.count] / spread.world
    return mean.to(b.dtype)


@of_own_outputs.register_fake
def _(g: Tensor, b: Tensor, shard: str) -> Tensor:
    return torch.empty_like(b)


def _keep_part(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.shard = inputs[1]


def _mean(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (b,) = ctx.saved_tensors
    return torch.ops.elmo.of_own_outputs(grad, b, ctx.shard), None


of_all_outputs.register_autograd(_mean, setup_context=_keep_part)
forbid_second_derivative(of_own_outputs)
