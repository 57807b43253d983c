"""Updates of parameters whose gradients exist: all that are alike in one launch.

Legend: T tensors, each a contiguous matrix of `columns` columns. A program owns BLOCK elements of
one of them; a table holds addresses and sizes, records (`records.py`) rates and counters. The same
arithmetic and the same random bits as a head's update (`rules.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.random_bits import mix32, row_keys
from elmo_compile.kernels.triton.records import RECORD, numbers, rates, records, word
from elmo_compile.kernels.triton.rules import (
    compensate,
    direction,
    loaded_compensation,
    stored_compensation,
    stored_state,
    with_error,
)
from elmo_compile.kernels.triton.storage import rounded, widen
from elmo_compile.numerics.blockwise import Blockwise
from elmo_compile.numerics.capture import capturing
from elmo_compile.numerics.formats import format_of, is_narrow
from elmo_compile.numerics.philox import COMPENSATION, WEIGHT
from elmo_compile.numerics.update import (
    STATE_STREAMS,
    Update,
    accumulate_rows,
    half_step_at_largest,
)

Item = tuple[Tensor, Tensor, Update, Tensor | None]

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.uint8,
    torch.float8_e5m2: tl.uint8,
}
_BLOCK = 1024
_KEPT_BLOCKS = 1 << 20
"""8 MiB of a table."""
_FIELDS = 10


@triton.jit
def _at(table_ptr, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a field of a tensor's row of the table. ALIGNED: to 16 bytes."""
    pointer = tl.load(table_ptr + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _words(rows, columns, seed, param, word2, word3):
    """Random words of elements given by row and column."""
    return mix32(row_keys(rows, seed, param, word2, word3) ^ columns.to(tl.uint32))


@triton.jit
def _parameters_kernel(
    table_ptr,
    records_ptr,
    blocks_ptr,
    guard_ptr,
    W: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SUM: tl.constexpr,
    C: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ECO: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    E5M2: tl.constexpr,
    LARGEST: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One update of BLOCK elements of one tensor. None as a type: there is no such tensor.

    guard: None, or one int32: not zero leaves everything as it is.
    ALIGNED: addresses and sizes are multiples of 16, which the compiler cannot see in numbers from
    memory, and without which its loads would take an element at a time.
    """
    tensor = tl.load(blocks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    table = table_ptr + tensor * FIELDS
    record = records_ptr + tensor * RECORD
    offsets = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    offsets = offsets + tl.arange(0, BLOCK)
    size = tl.load(table + 6)
    if guard_ptr is not None:
        size = tl.where(tl.load(guard_ptr) == 0, size, 0)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    mask = offsets < size
    width = tl.load(table + 7)
    row = offsets // width
    column = (offsets - row * width).to(tl.int32)
    seed, param = word(record, 0), word(record, 1)
    word2, word3 = word(record, 2), word(record, 3)
    rows = row + tl.load(table + 8)
    lr, weight_decay, beta1, beta2, rest1, rest2, eps, error = rates(record)
    w_ptr = _at(table, 0, W, ALIGNED)
    w = widen(tl.load(w_ptr + offsets, mask=mask, other=0))
    grad = widen(tl.load(_at(table, 1, G, ALIGNED) + offsets, mask=mask, other=0))
    factor = tl.load(table + 9)
    if factor != 0:
        grad = grad * tl.load(factor.to(tl.pointer_type(tl.float32)))
    m = w
    v = w
    a = w
    if FIRST is not None:
        m = widen(tl.load(_at(table, 2, FIRST, ALIGNED) + offsets, mask=mask, other=0))
    if SECOND is not None:
        v = widen(tl.load(_at(table, 3, SECOND, ALIGNED) + offsets, mask=mask, other=0))
    if SUM:
        a = tl.load(_at(table, 4, tl.float32, False) + row, mask=mask, other=1.0)
    u, m, v = direction(
        w, grad, m, v, a, lr, weight_decay, beta1, beta2, rest1, rest2, eps,
        RULE, FIRST is not None, NESTEROV,
    )  # fmt: skip
    words = _words(rows, column, seed, param, word2, word3)
    if C is None:
        new = rounded(w + u, words, W, STOCHASTIC)
    else:
        c_ptr = _at(table, 5, C, ALIGNED)
        s = u + loaded_compensation(tl.load(c_ptr + offsets, mask=mask, other=0), E5M2)
        new = rounded(w + s, words, W, False)
        c = compensate(w, s, widen(new), LARGEST, HALF)
        words = _words(rows, column, seed, param, word2, word3 + (3 << 24))
        tl.store(c_ptr + offsets, stored_compensation(c, words, E5M2), mask)
    tl.store(w_ptr + offsets, new, mask)
    if FIRST is not None:
        if ECO:
            m = with_error(m, v, error, (w + u) - widen(new), eps, RULE)
        words = _words(rows, column, seed, param, word2, word3 + (1 << 24))
        tl.store(_at(table, 2, FIRST, ALIGNED) + offsets, stored_state(m, words, FIRST), mask)
    if SECOND is not None:
        words = _words(rows, column, seed, param, word2, word3 + (2 << 24))
        tl.store(_at(table, 3, SECOND, ALIGNED) + offsets, stored_state(v, words, SECOND), mask)


assert (WEIGHT, *STATE_STREAMS, COMPENSATION) == (0, 1, 2, 3), "streams are in the kernel's words"


def update_parameters(items: Sequence[Item], guard: Tensor | None = None) -> list[Item]:
    """Update contiguous matrices in place, in one launch for each kind; the ones left to others.

    Left are float64, block-wise state and weights of which some rows are compensated.

    Args:
        items: (weight [R, D], gradient [R, D], update, factor on the gradient or None), all on one
            device.
        guard: None, or one int32 on the device: not zero leaves everything as it is.
    """
    kinds: dict[Any, list[Item]] = {}
    rest: list[Item] = []
    for item in items:
        kind = _kind(*item[:3])
        (rest if kind is None else kinds.setdefault(kind, [])).append(item)
    for kind, alike in kinds.items():
        _launch(dict(kind), alike, guard)
    return rest


def _kind(w: Tensor, grad: Tensor, update: Update) -> Any:
    """What one launch has in common, as items of the kernel's constants; None: not for it."""
    state, c = update.moments, update.compensation
    tensors = [w, grad, *state, *([] if c is None else [c])]
    if update.kahan_rows is not None or any(isinstance(s, Blockwise) for s in state):
        return None
    if any(t.dtype not in _TYPES or not t.is_contiguous() for t in tensors):
        return None
    if any(t.dtype == torch.float8_e5m2 for t in (w, grad, *state)):
        return None  # bytes are E4M3's, but of a compensation
    types = [_TYPES[s.dtype] for s in state] + [None, None]
    fmt = format_of(w.dtype) if is_narrow(w.dtype) else None
    return (
        ("W", _TYPES[w.dtype]),
        ("G", _TYPES[grad.dtype]),
        ("FIRST", types[0]),
        ("SECOND", types[1]),
        ("SUM", update.row_wise),
        ("C", None if c is None else _TYPES[c.dtype]),
        ("RULE", update.rule),
        ("NESTEROV", update.nesterov),
        ("ECO", update.eco),
        ("STOCHASTIC", update.rounding == "stochastic"),
        ("E5M2", c is not None and c.dtype == torch.float8_e5m2),
        ("LARGEST", fmt.max if fmt else math.inf),
        ("HALF", half_step_at_largest(fmt) if fmt else math.inf),
        ("ALIGNED", w.numel() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)),
    )


def _launch(kind: dict[str, Any], items: Sequence[Item], guard: Tensor | None) -> None:
    device = items[0][0].device
    table: list[int] = []
    held: list[Tensor] = []
    for w, grad, update, factor in items:
        if update.row_wise:
            sums = accumulate_rows(update.row_sums, grad, 1.0 if factor is None else factor)
            update.row_sums.copy_(
                sums if guard is None else torch.where(guard == 0, sums, update.row_sums)
            )
        moments = [s.data_ptr() for s in update.moments] + [0, 0]
        sums_at = update.row_sums.data_ptr() if update.row_wise else 0
        c = 0 if update.compensation is None else update.compensation.data_ptr()
        table += [w.data_ptr(), grad.data_ptr(), *moments[:2], sums_at, c, w.numel(), w.shape[1]]
        table += [update.row_offset, _address(factor, device, held)]
    with torch.cuda.device_of(items[0][0]):
        blocks = _blocks(tuple(-(-item[0].numel() // _BLOCK) for item in items), device)
        _parameters_kernel[(blocks.shape[0],)](
            numbers(table, device),
            records([update for _, _, update, _ in items], device),
            blocks,
            guard,
            BLOCK=_BLOCK,
            FIELDS=_FIELDS,
            RECORD=RECORD,
            **kind,
        )


def _blocks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [programs, 2]: the tensor and the block in it of each program, kept from step to step
    where it is small. What is made in a CUDA graph is the graph's."""
    keep = sum(counts) <= _KEPT_BLOCKS and not capturing(device)
    return _kept_blocks(counts, device) if keep else _made_blocks(counts, device)


def _made_blocks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    each = numbers(counts, device)
    tensors = torch.arange(len(counts), device=device)
    owner = torch.repeat_interleave(tensors, each, output_size=sum(counts))
    first = each.cumsum(0) - each
    blocks = torch.arange(sum(counts), device=device) - first[owner]
    return torch.stack((owner, blocks), 1).to(torch.int32)


_kept_blocks = functools.lru_cache(maxsize=64)(_made_blocks)


def _address(factor: Tensor | None, device: torch.device, held: list[Tensor]) -> int:
    """Of a float32 factor on the device, which `held` keeps alive; 0 for none."""
    if factor is None:
        return 0
    held.append(factor.to(device, torch.float32))
    return held[-1].data_ptr()
