"""The element-wise parts of a head step, as functions that run eagerly and compiled alike.

Logits are held transposed, z [C, N] for a chunk of C outputs, because the product w_c x^T is the
fastest of the layouts (benchmarks/NOTES.md). A bf16 chunk comes as `lanes`: int32 [C, N/2], rows n
and n + 1 of the batch in one word; then whatever has one entry a row comes as a pair of tensors.
`parts` below are the one or two tensors that stand for z. Arithmetic is float32, float64 for
float64. Shapes: C outputs of a chunk, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.kernels.aten.lanes import bf16_bits, pack_bf16, unpack_bf16
from elmo_compile.numerics import losses

_LOG2_E = 1.4426950408889634


def bce_gradient_(z: Tensor, bias_C1: Tensor | None, *, lanes: bool) -> None:
    """z <- sigmoid(z + bias), the gradient of a negative; positives are patched afterwards."""
    parts = _load(z, bias_C1, lanes)
    if lanes:
        gradients = [1.0 / (1.0 + _exp_for_bits(-v)) for v in parts]
    else:
        gradients = [torch.sigmoid(v) for v in parts]
    _store(z, gradients, lanes)


def bce_rows_gradient_(z: Tensor, bias_C1: Tensor | None, *, lanes: bool) -> tuple[Tensor, ...]:
    """`bce_rows`, and z <- sigmoid(z + bias): value and gradient share one exponential."""
    gradients, rows = [], []
    for v in _load(z, bias_C1, lanes):
        e = torch.exp(-v.abs())
        inverse = 1.0 / (1.0 + e)
        gradients.append(torch.where(v >= 0, inverse, e * inverse))
        rows.append((v.clamp_min(0) + losses.log1p_of_unit(e)).sum(0))
    _store(z, gradients, lanes)
    return tuple(rows)


def bce_dense_gradient_(z: Tensor, bias_C1: Tensor | None, y_CN: Tensor) -> None:
    """z <- sigmoid(z + bias) - y for dense targets."""
    (v,) = _load(z, bias_C1, False)
    z.copy_(losses.bce_gradient(v, y_CN.to(v.dtype)))


def ce_gradient_(
    z: Tensor, bias_C1: Tensor | None, lse: Tensor, second: Tensor, *, lanes: bool
) -> None:
    """z <- softmax(z + bias) from the rows' log-sum-exp; targets are patched afterwards.

    `second` is the odd rows' log-sum-exp for lanes, else the small part of each row's.
    """
    parts = _load(z, bias_C1, lanes)
    if lanes:
        gradients = [_exp_for_bits(v - row) for v, row in zip(parts, (lse, second))]
    else:
        gradients = [torch.exp(parts[0] - lse - second)]
    _store(z, gradients, lanes)


def ce_dense_gradient_(
    z: Tensor, bias_C1: Tensor | None, lse_N: Tensor, low_N: Tensor, total_N: Tensor, y_CN: Tensor
) -> None:
    """z <- total p - y for targets y that sum to `total`: `(total - y) p + y (p - 1)`."""
    (v,) = _load(z, bias_C1, False)
    y = y_CN.to(v.dtype)
    log_p = v - lse_N - low_N
    z.copy_((total_N - y) * torch.exp(log_p) + y * losses.ce_target_gradient(log_p))


def bce_rows(z: Tensor, bias_C1: Tensor | None, *, lanes: bool) -> tuple[Tensor, ...]:
    """`sum_c softplus(z)` of each row: the loss as if all were negatives."""
    return tuple(losses.softplus(v).sum(0) for v in _load(z, bias_C1, lanes))


def bce_dense_rows(z: Tensor, bias_C1: Tensor | None, y_CN: Tensor) -> tuple[Tensor, ...]:
    """`sum_c` of BCE with dense targets, of each row."""
    (v,) = _load(z, bias_C1, False)
    return (losses.bce_value(v, y_CN.to(v.dtype)).sum(0),)


def row_exponentials(
    z: Tensor, bias_C1: Tensor | None, shift: Tensor, shift_odd: Tensor | None, *, lanes: bool
) -> tuple[Tensor, ...]:
    """Largest logit of each row, and `sum_c e^(z - shift)`, in one pass over z.

    Returns the largest (of even and of odd rows for lanes), then the sums likewise.
    """
    parts = _load(z, bias_C1, lanes)
    tops = [v.amax(0) for v in parts]
    if shift_odd is None:
        return *tops, torch.exp(parts[0] - shift).sum(0)
    return *tops, *(_exp_for_bits(v - s).sum(0) for v, s in zip(parts, (shift, shift_odd)))


def weighted_sums(
    g: Tensor, weight: Tensor, weight_odd: Tensor | None, *, lanes: bool
) -> tuple[Tensor, ...]:
    """`sum_n weight_n g_cn` of each output: the bias gradient."""
    weights = (weight,) if weight_odd is None else (weight, weight_odd)
    return tuple((v * r).sum(1) for v, r in zip(_load(g, None, lanes), weights))


def cast_(out: Tensor, source: Tensor) -> None:
    """out <- source in another dtype."""
    out.copy_(source)


def _exp_for_bits(v: Tensor) -> Tensor:
    """`e^v` for logits of bf16, and for results that are rounded on their bits, which reads them
    twice.

    Inductor keeps an `exp` or a `sigmoid` that is read twice in a buffer as large as the chunk, in
    float32 (torch 2.13); not so `exp2`, which is faster too. Off by |v| 2^-24, relatively: for bf16
    nothing.
    """
    return torch.exp2(v * _LOG2_E)


def _load(z: Tensor, bias_C1: Tensor | None, lanes: bool) -> tuple[Tensor, ...]:
    """Logits in arithmetic precision, bias added."""
    if lanes:
        parts: tuple[Tensor, ...] = unpack_bf16(z)
    else:
        parts = (z if z.dtype == torch.float64 else z.to(torch.float32),)
    return parts if bias_C1 is None else tuple(v + bias_C1 for v in parts)


def _store(z: Tensor, values: list[Tensor], lanes: bool) -> None:
    """Write values into z, rounded to its dtype."""
    z.copy_(pack_bf16(bf16_bits(values[0]), bf16_bits(values[1])) if lanes else values[0])
