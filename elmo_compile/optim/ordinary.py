"""An update from a gradient that exists: the same arithmetic and rounding as the fused one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from elmo_compile.errors import OptionError
from elmo_compile.numerics.formats import format_of
from elmo_compile.numerics.philox import MOMENTUM, WEIGHT
from elmo_compile.numerics.rounding import round_nearest, stochastic_round
from elmo_compile.numerics.update import Update, sgd

_BLOCK = 1 << 22
"""Elements widened to float32 at once."""

_ROUNDED = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def apply_update(param: Tensor, grad: Tensor, update: Update) -> None:
    """Update `param` (and the momentum buffer) in place from a gradient, block of rows by block."""
    if grad.is_sparse:
        _apply_sparse(param, grad, update)
        return
    if param.is_complex():
        buffer = None if update.buffer is None else torch.view_as_real(update.buffer)
        update = dataclasses.replace(update, buffer=buffer)
        param, grad = torch.view_as_real(param), torch.view_as_real(grad)
    if param.dim() < 2:
        _apply_block(param, grad, update.buffer, update, 0)
        return
    columns = max(1, param.shape[-1])
    p_RD = param.view(-1, columns) if param.is_contiguous() else param
    g_RD = grad.reshape(p_RD.shape)
    m_RD = None if update.buffer is None else update.buffer.view(p_RD.shape)
    rows = max(1, _BLOCK // max(1, p_RD[0].numel() if p_RD.shape[0] else 1))
    if not param.is_contiguous():
        rows = max(1, p_RD.shape[0])
    for start in range(0, p_RD.shape[0], rows):
        block = slice(start, start + rows)
        m = None if m_RD is None else m_RD[block]
        _apply_block(p_RD[block], g_RD[block], m, update, start)


def _apply_block(p: Tensor, g: Tensor, m: Tensor | None, update: Update, row: int) -> None:
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    new_p, new_m = sgd(
        p.to(wide),
        g.to(wide),
        None if m is None else m.to(wide),
        lr=update.lr,
        weight_decay=update.weight_decay,
        momentum=update.momentum,
        nesterov=update.nesterov,
    )
    _store(p, new_p, update, WEIGHT, row, update.rounding == "stochastic")
    if m is not None and new_m is not None:
        _store(m, new_m, update, MOMENTUM, row, True)


def _store(out: Tensor, value: Tensor, update: Update, stream: int, row: int, noise: bool) -> None:
    if out.dtype not in _ROUNDED:
        out.copy_(value)
        return
    if not noise:
        out.copy_(round_nearest(value, format_of(out.dtype).dtype))
        return
    rounded = stochastic_round(
        value,
        out.dtype,
        seed=update.seed,
        param_id=update.param_id,
        stream=stream,
        step=update.step,
        offset=row + update.row_offset if value.dim() > 1 else 0,
    )
    out.copy_(rounded)


def _apply_sparse(param: Tensor, grad: Tensor, update: Update) -> None:
    """Rows of an embedding, as torch.optim.SGD does: no momentum, no weight decay."""
    if update.momentum or update.weight_decay or param.dtype in _ROUNDED:
        raise OptionError(
            "a sparse gradient is accepted for a float32 parameter without momentum and without "
            f"weight_decay; got dtype={param.dtype}, momentum={update.momentum}, "
            f"weight_decay={update.weight_decay}. Use sparse=False or torch.optim.SparseAdam"
        )
    param.add_(grad, alpha=-update.lr)


def buffer_dtype(weight: torch.dtype) -> torch.dtype:
    """What a momentum buffer of a weight is stored in."""
    if weight.itemsize == 1:
        return torch.bfloat16
    return torch.float32 if weight == torch.float16 else weight
