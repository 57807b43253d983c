"""The specification of a head step: dense, unchunked, in the arithmetic dtype of the problem.

It holds [N, L] and [L, D] tensors on purpose: read it against the formulas, test kernels against
it, never run it on a large head. Shapes: N rows, D features, L outputs, M positives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elmo_compile.kernels.problem import Forward, Gradients, HeadProblem, UpdateResult
from elmo_compile.numerics import losses, philox
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.formats import format_of, is_narrow
from elmo_compile.numerics.losses import CE, Positives
from elmo_compile.numerics.rounding import round_nearest, round_stochastic_bits
from elmo_compile.numerics.update import STATE_STREAMS, Update, accumulate_rows, advance


@torch.no_grad()
def forward(p: HeadProblem) -> Forward:
    """Loss of each row, and for cross entropy its log-sum-exp.

    BCE: `sum_l max(z, 0) - z y + log(1 + e^-|z|)`; CE: `sum_l y (lse - z)`, `lse = log sum_l e^z`.
    """
    z_NL, y_NL = _logits(p), _targets(p)
    if p.loss.name == CE:
        lse_N = z_NL.logsumexp(1)
        rows_N = (y_NL * (lse_N[:, None] - z_NL)).sum(1)
        return Forward(rows_N, losses.two_parts(lse_N, lse_N.dtype))
    no_stats = torch.empty(0, dtype=torch.float32, device=z_NL.device)
    return Forward(losses.bce_value(z_NL, y_NL).sum(1), no_stats)


@torch.no_grad()
def backward(
    p: HeadProblem,
    stats_2N: Tensor,
    scale_N: Tensor,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
    need_db: bool = True,
    need_value: bool = False,
    need_norm: bool = False,
) -> Gradients:
    """`dx = scale_n g w`, `dw = (scale g)^T x`, `db = sum_n scale g` with `g = dloss_n/dz_nl`."""
    g_NL = scale_N.to(_arithmetic(p))[:, None] * _logit_gradient(p, stats_2N)
    dw_LD = g_NL.t() @ _features(p)
    norm2 = dw_LD.double().square().sum() if need_norm else None
    if p.w_LD.dtype != torch.float8_e4m3fn and not p.wide_dw:
        dw_LD = dw_LD.to(p.w_LD.dtype)
    return Gradients(
        g_NL @ _weight(p) if need_dx else None,
        dw_LD if need_dw else None,
        g_NL.sum(0) if need_db else None,
        forward(p).rows_N if need_value else None,
        norm2,
    )


@torch.no_grad()
def loss_and_gradients(
    p: HeadProblem,
    scale_N: Tensor,
    rows: int,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
    need_db: bool = True,
    top: Any = None,
) -> Gradients:
    """`forward` and `backward`; here nothing is saved by doing both at once."""
    assert top is None
    made = forward(p)
    needs = {"need_dx": need_dx, "need_dw": need_dw, "need_db": need_db}
    return backward(p, made.stats_2N, scale_N, **needs)._replace(rows_N=made.rows_N)


@torch.no_grad()
def backward_update(
    p: HeadProblem,
    stats_2N: Tensor,
    scale_N: Tensor,
    update: Update,
    *,
    need_dx: bool = True,
    need_db: bool = True,
    need_value: bool = False,
) -> UpdateResult:
    """dx and db from the weight as it was; then weight and state are updated in place."""
    rows_N = forward(p).rows_N if need_value else None
    g_NL = scale_N.to(_arithmetic(p))[:, None] * _logit_gradient(p, stats_2N)
    dx_ND = g_NL @ _weight(p) if need_dx else None
    db_L = g_NL.sum(0) if need_db else None
    work = _arithmetic(p)
    apply_update(p.w_LD, g_NL.t() @ _features(p), update, work)
    return UpdateResult(dx_ND, db_L, rows_N)


@torch.no_grad()
def apply_update(
    w_LD: Tensor, grad_LD: Tensor, update: Update, work: torch.dtype = torch.float32
) -> None:
    """Update a weight, its state and its compensation in place from a whole gradient."""
    update = update.on_host()
    if update.row_wise:
        update.row_sums.copy_(accumulate_rows(update.row_sums, grad_LD))
    compensated_L = torch.zeros(w_LD.shape[0], dtype=torch.bool, device=w_LD.device)
    c_LD = torch.zeros(w_LD.shape, dtype=work, device=w_LD.device)
    rows_H = torch.arange(w_LD.shape[0]) if update.kahan_rows is None else update.kahan_rows
    if update.compensation is not None:
        compensated_L[rows_H] = True
        c_LD[rows_H] = update.compensation.to(work)
    plain = _advanced(w_LD, grad_LD, None, update, work)
    kahan = _advanced(w_LD, grad_LD, c_LD, update, work)
    for out, value, stream in zip(update.moments, plain[1], STATE_STREAMS):
        if isinstance(out, Blockwise):
            out.store(0, w_LD.shape[0], value.to(torch.float32))
            continue
        # A narrow state is rounded stochastically whatever the weight does: with rounding to
        # nearest it would never decay.
        out.copy_(_rounded(value, out.dtype, update, stream))
    if update.compensation is not None and kahan[2] is not None:
        c = _rounded(kahan[2], update.compensation.dtype, update, philox.COMPENSATION)
        update.compensation.copy_(c[rows_H] if c.element_size() > 1 else _take(c, rows_H))
    new = torch.where(compensated_L[:, None], kahan[0].to(work), plain[0].to(work))
    w_LD.copy_(new.to(w_LD.dtype))


def _take(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of an fp8 tensor."""
    return t.view(torch.uint8)[rows].view(t.dtype)


def _advanced(
    w_LD: Tensor, grad_LD: Tensor, c_LD: Tensor | None, update: Update, work: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """`numerics.update.advance` on the whole weight, compensated or not."""
    stream = philox.WEIGHT if update.rounding == "stochastic" and c_LD is None else None
    state = tuple(
        (s.load(0, w_LD.shape[0]) if isinstance(s, Blockwise) else s).to(work)
        for s in update.moments
    )
    if update.row_wise:
        state = (update.row_sums.to(work)[:, None],)
    return advance(
        update.form, w_LD.to(work), grad_LD, state, c_LD, update.rates,
        lambda v: _rounded(v, w_LD.dtype, update, stream).to(work),
        format_of(w_LD.dtype) if is_narrow(w_LD.dtype) else None,
    )  # fmt: skip


def _rounded(value_LD: Tensor, dtype: torch.dtype, update: Update, stream: int | None) -> Tensor:
    """Values in a storage dtype: stochastically on a stream, or to nearest."""
    if not is_narrow(dtype):
        return value_LD.to(dtype)
    if stream is None:
        return round_nearest(value_LD, dtype)
    first, device = update.row_offset, value_LD.device
    row_L = torch.arange(first, first + value_LD.shape[0], device=device)
    key_L = philox.row_keys(update.seed, update.param_id, int(update.step), stream, row_L)
    d_D = torch.arange(value_LD.shape[1], dtype=torch.int32, device=device)
    words_LD = philox.element_words(key_L, d_D)
    return round_stochastic_bits(value_LD.to(torch.float32), words_LD, format_of(dtype)).to(dtype)


def _arithmetic(p: HeadProblem) -> torch.dtype:
    """float64 for float64 compute, else float32."""
    return torch.float64 if p.compute_dtype == torch.float64 else torch.float32


def _features(p: HeadProblem) -> Tensor:
    """x rounded to the compute dtype, held in the arithmetic dtype."""
    return p.x_ND.to(p.compute_dtype).to(_arithmetic(p))


def _weight(p: HeadProblem) -> Tensor:
    """w rounded to the compute dtype, held in the arithmetic dtype."""
    return p.w_LD.to(p.compute_dtype).to(_arithmetic(p))


def _logits(p: HeadProblem) -> Tensor:
    z_NL = _features(p) @ _weight(p).t()
    return z_NL if p.b_L is None else z_NL + p.b_L.to(z_NL.dtype)


def _targets(p: HeadProblem) -> Tensor:
    """Targets as a dense matrix; a row cross entropy ignores is all zero."""
    work, (num_rows, num_outputs) = _arithmetic(p), (p.x_ND.shape[0], p.w_LD.shape[0])
    if isinstance(p.target, Positives):
        rows_M, cols_M, values_M = p.target
        y = torch.zeros(num_rows, num_outputs + 1, dtype=work, device=rows_M.device)
        values_M = torch.ones_like(cols_M) if values_M is None else values_M
        return y.index_put_((rows_M, cols_M), values_M.to(work))[:, :num_outputs]
    if p.loss.targets == "dense":
        return p.target.to(work)
    y = torch.zeros(num_rows, num_outputs, dtype=work, device=p.target.device)
    counted_N = p.target != p.loss.ignore_index
    rows_N = torch.arange(num_rows, device=p.target.device)[counted_N]
    return y.index_put_((rows_N, p.target[counted_N]), torch.ones((), dtype=work, device=y.device))


def _logit_gradient(p: HeadProblem, stats_2N: Tensor) -> Tensor:
    """`g_nl = dloss_n/dz_nl`: `sigmoid(z) - y`, or `(sum_l y) p - y` with `p = e^(z - lse)`."""
    z_NL, y_NL = _logits(p), _targets(p)
    if p.loss.name == CE:
        log_p_NL = z_NL - stats_2N.to(z_NL.dtype).sum(0)[:, None]
        rest_NL = (y_NL.sum(1, keepdim=True) - y_NL) * torch.exp(log_p_NL)
        return rest_NL + y_NL * losses.ce_target_gradient(log_p_NL)
    return losses.bce_gradient(z_NL, y_NL)
