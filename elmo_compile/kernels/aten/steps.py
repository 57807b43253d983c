"""The update of a chunk of weights: load, one rule of `numerics.update`, round, store.

Written once for elements as they are (`plain_`) and once for int32 lanes (`lanes_`).
Shapes: C outputs of a chunk, D features; D may be two dimensions, the last of them the lanes of a
vector (`chunk_update.LANES`). Keys are the int32 row keys of `numerics.philox`, None for
rounding to nearest. `d` is the int32 column of each element, or of the first one of each word: an
argument, because compiled code builds an `arange` one lane at a time, at the cost of the hash. Both
come half mixed (`philox.half_mixed`), so that an element has less to do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elmo_compile.kernels.aten import lanes
from elmo_compile.numerics import philox
from elmo_compile.numerics.formats import BF16, E4M3, StorageFormat, format_of, is_narrow
from elmo_compile.numerics.rounding import (
    fp8_codes_nearest,
    fp8_codes_stochastic,
    nearest_on_grid,
    round_nearest,
    round_stochastic_bits,
)
from elmo_compile.numerics.update import Form, Rates, accumulate_rows, advance


def accumulate_rows_(a: Tensor, dw: Tensor, scale: float) -> None:
    """Row-wise Adagrad's sum, in place."""
    a.copy_(accumulate_rows(a, dw, scale))


def plain_(
    w: Tensor,
    dw: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    c: Tensor | None,
    w_key: Tensor | None,
    first_key: Tensor | None,
    second_key: Tensor | None,
    c_key: Tensor | None,
    d: Tensor,
    scale: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    error: float,
    *,
    form: Form,
) -> None:
    """w, its state and its compensation <- one update with the gradient `scale dw`.

    Each is rounded to its dtype. Adagrad's `first` is its sum a row [C, 1], read only.
    """
    work = torch.float64 if torch.float64 in (w.dtype, dw.dtype) else torch.float32
    stored = tuple(s for s in (first, second) if s is not None)
    fmt = format_of(w.dtype) if is_narrow(w.dtype) else None

    def to_grid(v: Tensor) -> Tensor:
        if fmt is None:
            return v
        if w_key is None:
            return nearest_on_grid(v.to(torch.float32), fmt).to(work)
        return _on_grid(v.to(torch.float32), w_key, d, fmt).to(work)

    new_w, state, new_c = advance(
        form, w.to(work), dw.to(work) * scale, tuple(s.to(work) for s in stored),
        None if c is None else c.to(work),
        Rates(lr, weight_decay, beta1, beta2, eps, error), to_grid, fmt,
    )  # fmt: skip
    w.copy_(new_w.to(w.dtype))
    for out, value, key in zip(stored, state, (first_key, second_key)):
        out.copy_(_rounded(value, out.dtype, key, d))
    if c is not None and new_c is not None:
        c.copy_(_rounded(new_c, c.dtype, c_key, d))


def lanes_(
    w: Tensor,
    decoded: Tensor | None,
    dw: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    c: Tensor | None,
    w_key: Tensor | None,
    first_key: Tensor | None,
    second_key: Tensor | None,
    c_key: Tensor | None,
    d: Tensor,
    scale: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    error: float,
    *,
    form: Form,
) -> None:
    """`plain_` on words: all bf16 pairs, or w E4M3 quads with `decoded` and dw by halves.

    By halves is [C, 2, D/4]: one symbolic width to trace, where a cut through [C, D/2] has two.
    """
    fmt = BF16 if decoded is None else E4M3
    rates = Rates(lr, weight_decay, beta1, beta2, eps, error)
    if decoded is None:
        w_parts: tuple[Tensor, ...] = lanes.unpack_bf16(w)
        dw_parts: tuple[Tensor, ...] = lanes.unpack_bf16(dw)
    else:
        w_parts, dw_parts = _halves(decoded), _halves(dw)
    stored = [s for s in (first, second) if s is not None]
    row_wise = form.rule == "adagrad"
    state_parts = [(s,) * 4 if row_wise else lanes.unpack_bf16(s) for s in stored]
    c_parts = None if c is None else lanes.unpack_bf16(c)
    new_w: list[Tensor] = []
    new_state: list[list[Tensor]] = [[] for _ in stored]
    new_c: list[Tensor] = []
    for j, (w_j, dw_j) in enumerate(zip(w_parts, dw_parts)):

        def to_grid(v: Tensor, column: Tensor = d ^ j) -> Tensor:
            if decoded is not None:  # nothing but the weight is updated: its bytes will do
                if w_key is None:
                    return fp8_codes_nearest(v, fmt)
                return fp8_codes_stochastic(v, _words(w_key, column), fmt)
            if w_key is None:
                return nearest_on_grid(v, fmt)
            return _on_grid(v, w_key, column, fmt)

        v, state, e = advance(
            form, w_j, dw_j * scale, tuple(parts[j] for parts in state_parts),
            None if c_parts is None else c_parts[j], rates, to_grid, fmt,
        )  # fmt: skip
        new_w.append(v)
        for into, value, key in zip(new_state, state, (first_key, second_key)):
            into.append(_on_grid(value, key, d ^ j, BF16))  # type: ignore[arg-type]
        if e is not None:
            new_c.append(_on_grid(e, c_key, d ^ j, BF16))  # type: ignore[arg-type]
    if decoded is None:
        w.copy_(_pack(new_w))
    else:
        w.copy_(lanes.pack_bytes(new_w))
    for out, parts in zip(stored, new_state):
        if parts:
            out.copy_(_pack(parts))
    if c is not None:
        c.copy_(_pack(new_c))


def _pack(parts: list[Tensor]) -> Tensor:
    """bf16 words of float32 values on bf16's grid."""
    even, odd = (v.view(torch.int32) for v in parts)
    return lanes.pack_bf16(even, odd)


def _halves(words: Tensor) -> tuple[Tensor, ...]:
    """float32 values of columns 4i, 4i+1, 4i+2, 4i+3 of bf16 words in `halves_order`."""
    return lanes.unpack_bf16(words[:, 0]) + lanes.unpack_bf16(words[:, 1])


def _on_grid(v: Tensor, key_C: Tensor, d_D: Tensor, fmt: StorageFormat) -> Tensor:
    """float32 values of a format's grid, rounded stochastically."""
    return round_stochastic_bits(v, _words(key_C, d_D), fmt)


def _words(key_C: Tensor, d_D: Tensor) -> Tensor:
    """Random words of elements, from half mixed keys and columns."""
    return philox.mixed(key_C.view(-1, *(1,) * d_D.ndim) ^ d_D)


def _rounded(v: Tensor, dtype: torch.dtype, key_C: Tensor | None, d_D: Tensor) -> Tensor:
    """v in a storage dtype: stochastically with keys, otherwise to nearest."""
    if not is_narrow(dtype):
        return v.to(dtype)
    if key_C is None:
        return round_nearest(v, dtype)
    return _on_grid(v.to(torch.float32), key_C, d_D, format_of(dtype)).to(dtype)
