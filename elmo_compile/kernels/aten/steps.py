"""The update of a chunk of weights: load, one rule of `numerics.update`, round, store.

Written once for elements as they are (`plain_`) and once for int32 lanes (`lanes_`).
Shapes: C outputs of a chunk, D features. Keys are the int32 row keys of `numerics.philox`, None for
rounding to nearest. `d` is the int32 column of each element, or of the first one of each word: an
argument, because compiled code builds an `arange` one lane at a time, at the cost of the hash.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.kernels.aten import lanes
from elmo_compile.numerics import philox
from elmo_compile.numerics.formats import BF16, E4M3, StorageFormat, format_of, is_narrow
from elmo_compile.numerics.rounding import round_nearest, round_stochastic_bits
from elmo_compile.numerics.update import sgd


def row_keys(
    seed: Tensor, param_id: Tensor, step_lo: Tensor, stream_step_hi: Tensor, rows: Tensor
) -> Tensor:
    """`numerics.philox.row_keys_from_words` with the words as arguments of their own."""
    return philox.row_keys_from_words((seed, param_id, step_lo, stream_step_hi), rows)


def plain_(
    w: Tensor,
    dw: Tensor,
    m: Tensor | None,
    w_key: Tensor | None,
    m_key: Tensor | None,
    d: Tensor,
    scale: float,
    lr: float,
    weight_decay: float,
    momentum: float,
    *,
    nesterov: bool,
) -> None:
    """w, m <- one update with the gradient `scale dw`, rounded to their dtypes."""
    work = torch.float64 if dw.dtype == torch.float64 else torch.float32
    new_w, new_m = sgd(
        w.to(work),
        dw.to(work) * scale,
        None if m is None else m.to(work),
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
    )
    w.copy_(_rounded(new_w, w.dtype, w_key, d))
    if m is not None and new_m is not None:
        m.copy_(_rounded(new_m, m.dtype, m_key, d))


def lanes_(
    w: Tensor,
    decoded: Tensor | None,
    dw: Tensor,
    m: Tensor | None,
    w_key: Tensor,
    m_key: Tensor | None,
    d: Tensor,
    scale: float,
    lr: float,
    weight_decay: float,
    momentum: float,
    *,
    nesterov: bool,
) -> None:
    """`plain_` on words: w and m bf16 pairs, or w E4M3 quads with `decoded` and dw in halves."""
    if decoded is None:
        w_parts: tuple[Tensor, ...] = lanes.unpack_bf16(w)
        dw_parts: tuple[Tensor, ...] = lanes.unpack_bf16(dw)
    else:
        w_parts, dw_parts = _halves(decoded), _halves(dw)
    m_parts = (None,) * len(w_parts) if m is None else lanes.unpack_bf16(m)
    new_w, new_m = [], []
    for j, (w_j, dw_j, m_j) in enumerate(zip(w_parts, dw_parts, m_parts)):
        v, u = sgd(
            w_j,
            dw_j * scale,
            m_j,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
        )
        new_w.append(_on_grid(v, w_key, d + j, BF16 if decoded is None else E4M3))
        if u is not None and m_key is not None:
            new_m.append(_on_grid(u, m_key, d + j, BF16))
    if decoded is None:
        w.copy_(lanes.pack_bf16(*(v.view(torch.int32) for v in new_w)))
    else:
        w.copy_(lanes.pack_bytes([lanes.e4m3_byte(v) for v in new_w]))
    if m is not None:
        m.copy_(lanes.pack_bf16(*(v.view(torch.int32) for v in new_m)))


def _halves(words: Tensor) -> tuple[Tensor, ...]:
    """float32 values of columns 4i, 4i+1, 4i+2, 4i+3 of bf16 words in `halves_order`."""
    half = words.shape[1] // 2
    return lanes.unpack_bf16(words[:, :half]) + lanes.unpack_bf16(words[:, half:])


def _on_grid(v: Tensor, key_C: Tensor, d_D: Tensor, fmt: StorageFormat) -> Tensor:
    """float32 values of a format's grid, rounded stochastically."""
    return round_stochastic_bits(v, philox.element_words(key_C, d_D), fmt)


def _rounded(v: Tensor, dtype: torch.dtype, key_C: Tensor | None, d_D: Tensor) -> Tensor:
    """v in a storage dtype: stochastically with keys, otherwise to nearest."""
    if not is_narrow(dtype):
        return v.to(dtype)
    if key_C is None:
        return round_nearest(v, dtype)
    return _on_grid(v.to(torch.float32), key_C, d_D, format_of(dtype)).to(dtype)
