"""What operations are written as in a trace: before autograd sees them, and after.

Softmax is written with log-sum-exp, which stays one operation: its gradient needs no second pass
over the outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@functools.cache
def table() -> dict[Any, Callable[..., Any]]:
    """Decompositions: torch's core ones, its losses, and what `rewritten` has."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    found: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    found.pop(aten.logsumexp.default, None)
    losses = ["binary_cross_entropy_with_logits", "binary_cross_entropy"]
    found.update(get_decompositions([getattr(aten, name) for name in losses]))
    found[aten.var.correction] = _var
    found[aten.std.correction] = _std
    found[aten.linalg_vector_norm.default] = _vector_norm
    found[aten.max.default] = torch.amax
    found[aten.min.default] = torch.amin
    return found | rewritten()


@functools.cache
def rewritten() -> dict[Any, Callable[..., Any]]:
    """What is written in other operations before autograd sees it.

    These have a simpler gradient so. Everything else has autograd's own formula, which is finite
    where that of its parts is not: the cross entropy of a saturated sigmoid, softplus of a large
    number, the deviation of equal numbers.
    """
    from torch._decomp import get_decompositions

    names = [
        "nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss", "mse_loss", "huber_loss",
        "smooth_l1_loss", "soft_margin_loss", "softshrink", "hardshrink", "unbind",
        "select_scatter",
    ]  # fmt: skip
    found: dict[Any, Callable[..., Any]] = dict(
        get_decompositions([getattr(aten, name) for name in names])
    )
    found[aten._log_softmax.default] = _log_softmax
    found[aten._softmax.default] = _softmax
    # A number that is written is a scalar on the CPU, whatever it is written into.
    found[aten.copy.default] = lambda into, source, non_blocking=False: source.to(
        into.device, into.dtype
    ).expand(into.shape)
    found[aten.fill.Tensor] = found[aten.copy.default]
    # torch 2.15 writes `z[:, 0] = 1.0` so; the value does not depend on what was there.
    found[aten.fill.Scalar] = lambda into, value: torch.full(
        into.shape, value, dtype=into.dtype, device=into.device
    )
    found[aten.split_with_sizes.default] = _split_with_sizes
    found[aten.native_layer_norm.default] = _layer_norm
    found[aten.index_put.default] = _index_put
    found[aten.mean.default] = _mean
    found[aten.mean.dim] = _mean
    return found


def _split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Slices, as which parts of rows are understood."""
    parts, start = list[Tensor](), 0
    for size in sizes:
        parts.append(torch.ops.aten.slice.Tensor(x, dim, start, start + size))
        start = start + size
    return parts


def _index_put(
    into: Tensor,
    indices: Sequence[Tensor | None],
    value: Tensor,
    accumulate: bool = False,
) -> Any:
    """One value written by a mask chooses between two values, which can be done in chunks."""
    given = [(i, index) for i, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype not in (torch.bool, torch.uint8) or value.numel() != 1:
        return NotImplemented
    ((start, mask),) = given
    mask = mask.reshape(mask.shape + (1,) * (into.dim() - start - mask.dim()))
    one = value.reshape(())
    return torch.where(mask.bool(), into + one if accumulate else one, into)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    x = x.to(torch.float32) if half_to_float else x
    return x - torch.logsumexp(x, dim, keepdim=True)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    made: Tensor = torch.exp(_log_softmax(x, dim, half_to_float))
    return made


def _mean(
    x: Tensor,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    count: Any = 1
    for d in dims:
        count = count * x.shape[d]
    mean: Tensor = torch.sum(x, dims, keepdim, dtype=dtype) / count
    return mean


def _var(
    x: Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    centred = x - _mean(x, dim, True)
    count: Any = 1
    for d in dim if dim else range(x.dim()):
        count = count * x.shape[d]
    free = count - (1 if correction is None else correction)
    var: Tensor = torch.sum(centred * centred, list(dim or range(x.dim())), keepdim) / free
    return var


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = _mean(x, dims, True)
    scale = torch.rsqrt(_var(x, dims, correction=0, keepdim=True) + eps)
    made = (x - mean) * scale
    made = made if weight is None else made * weight
    return made if bias is None else made + bias, mean, scale


def _std(x: Tensor, dim: Sequence[int] | None = None, **options: Any) -> Tensor:
    return torch.sqrt(_var(x, dim, **options))


def _vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """By sums of powers, in float32 at least."""
    result = dtype or x.dtype
    size = x.to(torch.promote_types(result, torch.float32)).abs()
    dims = list(range(x.dim()) if dim is None else dim)
    if ord in (math.inf, -math.inf):
        made = torch.amax(size, dims, keepdim) if ord > 0 else torch.amin(size, dims, keepdim)
    elif ord == 0:
        made = torch.sum((size != 0).to(size.dtype), dims, keepdim)
    elif ord == 1:
        made = torch.sum(size, dims, keepdim)
    elif ord == 2:
        made = torch.sqrt(torch.sum(size * size, dims, keepdim))
    else:
        made = torch.sum(size.pow(ord), dims, keepdim).pow(1 / ord)
    return made.to(result)
