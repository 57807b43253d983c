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
_FEW_ROWS = _BLOCK // 2
"""Columns from which on a block lies in three rows at most."""
_WORTH_KEYS = 32
"""Columns from which on row keys are made once a row: they take at most half a byte a weight."""
_KEY_BLOCK = 256
_KEPT_BLOCKS = 1 << 20
"""32 MiB of a table."""
_FIELDS = 11
_NO_SLOT = 15


@triton.jit
def _at(table_ptr, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a field of a tensor's row of the table. ALIGNED: to 16 bytes."""
    pointer = tl.load(table_ptr + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _row_keys(rows, record, row_offset, STREAM: tl.constexpr):
    """The keys of rows of a tensor for a stream."""
    return row_keys(
        rows + row_offset, word(record, 0), word(record, 1), word(record, 2),
        word(record, 3) + (STREAM << 24),
    )  # fmt: skip


@triton.jit
def _words(
    keys_ptr, all_rows, first_key, rows, columns, mask, record, row_offset,
    SLOTS: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Random words of elements given by row and column; anything for a stream that has no slot."""
    SLOT: tl.constexpr = (SLOTS >> (4 * STREAM)) & 15
    if SLOT == 15:
        return columns.to(tl.uint32)
    elif keys_ptr is None:
        keys = _row_keys(rows, record, row_offset, STREAM)
        return mix32(keys ^ columns.to(tl.uint32))
    else:
        keys = tl.load(keys_ptr + SLOT * all_rows + first_key + rows, mask=mask, other=0)
        return mix32(keys.to(tl.uint32, bitcast=True) ^ columns.to(tl.uint32))


@triton.jit
def _store_keys(
    keys_ptr, all_rows, rows, record, row_offset, mask, SLOTS: tl.constexpr, STREAM: tl.constexpr
):
    SLOT: tl.constexpr = (SLOTS >> (4 * STREAM)) & 15
    if SLOT != 15:
        keys = _row_keys(rows, record, row_offset, STREAM)
        tl.store(keys_ptr + SLOT * all_rows, keys.to(tl.int32, bitcast=True), mask)


@triton.jit(do_not_specialize=["all_rows"])
def _parameter_keys_kernel(
    keys_ptr,
    table_ptr,
    records_ptr,
    blocks_ptr,
    all_rows: tl.int64,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    RECORD: tl.constexpr,
):
    """keys[slot, first key + row] of BLOCK rows of one tensor, for the streams that have a slot.

    A kernel of their own: ten rounds of Philox for an element would be most of an update.
    """
    tensor = tl.load(blocks_ptr + 4 * tl.program_id(0))
    table = table_ptr + tensor * FIELDS
    record = records_ptr + tensor * RECORD
    rows = tl.load(blocks_ptr + 4 * tl.program_id(0) + 2) + tl.arange(0, BLOCK)
    mask = rows < tl.load(table + 6) // tl.load(table + 7)
    at = tl.load(table + 10) + rows
    row_offset = tl.load(table + 8)
    for stream in tl.static_range(4):
        _store_keys(keys_ptr + at, all_rows, rows, record, row_offset, mask, SLOTS, stream)


@triton.jit(do_not_specialize=["all_rows"])
def _parameters_kernel(
    table_ptr,
    records_ptr,
    blocks_ptr,
    keys_ptr,
    guard_ptr,
    all_rows: tl.int64,
    W: tl.constexpr,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SUM: tl.constexpr,
    C: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ECO: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    E5M2: tl.constexpr,
    LARGEST: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One update of BLOCK elements of one tensor. None as a type: there is no such tensor.

    keys: None, or what `_parameter_keys_kernel` made.
    guard: None, or one int32: not zero leaves everything as it is.
    ALIGNED: addresses and sizes are multiples of 16, which the compiler cannot see in numbers from
    memory, and without which its loads would take an element at a time.
    """
    tensor = tl.load(blocks_ptr + 4 * tl.program_id(0))
    table = table_ptr + tensor * FIELDS
    record = records_ptr + tensor * RECORD
    offsets = tl.load(blocks_ptr + 4 * tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(table + 6)
    if guard_ptr is not None:
        size = tl.where(tl.load(guard_ptr) == 0, size, 0)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    mask = offsets < size
    width = tl.load(table + 7)
    # Where the block begins is in its table: no division for an element, or a short one.
    column = tl.load(blocks_ptr + 4 * tl.program_id(0) + 3) + tl.arange(0, BLOCK)
    if FEW_ROWS:
        passed = (column >= width).to(tl.int64) + (column >= 2 * width).to(tl.int64)
    else:
        passed = (column.to(tl.int32) // width.to(tl.int32)).to(tl.int64)
    row = tl.load(blocks_ptr + 4 * tl.program_id(0) + 2) + passed
    column = (column - passed * width).to(tl.int32)
    first_key, row_offset = tl.load(table + 10), tl.load(table + 8)
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
        RULE, FIRST is not None, NESTEROV, DECAY,
    )  # fmt: skip
    words = _words(
        keys_ptr, all_rows, first_key, row, column, mask, record, row_offset, SLOTS, 0
    )  # fmt: skip
    if C is None:
        new = rounded(w + u, words, W, STOCHASTIC)
    else:
        c_ptr = _at(table, 5, C, ALIGNED)
        s = u + loaded_compensation(tl.load(c_ptr + offsets, mask=mask, other=0), E5M2)
        new = rounded(w + s, words, W, False)
        c = compensate(w, s, widen(new), LARGEST, HALF)
        words = _words(
            keys_ptr, all_rows, first_key, row, column, mask, record, row_offset, SLOTS, 3
        )  # fmt: skip
        tl.store(c_ptr + offsets, stored_compensation(c, words, E5M2), mask)
    tl.store(w_ptr + offsets, new, mask)
    if FIRST is not None:
        if ECO:
            m = with_error(m, v, error, (w + u) - widen(new), eps, RULE)
        words = _words(
            keys_ptr, all_rows, first_key, row, column, mask, record, row_offset, SLOTS, 1
        )  # fmt: skip
        tl.store(_at(table, 2, FIRST, ALIGNED) + offsets, stored_state(m, words, FIRST), mask)
    if SECOND is not None:
        words = _words(
            keys_ptr, all_rows, first_key, row, column, mask, record, row_offset, SLOTS, 2
        )  # fmt: skip
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
        if item[0].numel() == 0:
            continue
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
        ("DECAY", update.form.decay),
        ("STOCHASTIC", update.rounding == "stochastic"),
        ("E5M2", c is not None and c.dtype == torch.float8_e5m2),
        ("LARGEST", fmt.max if fmt else math.inf),
        ("HALF", half_step_at_largest(fmt) if fmt else math.inf),
        ("ALIGNED", w.numel() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)),
        ("FEW_ROWS", w.shape[1] >= _FEW_ROWS),
        ("KEYED", w.shape[1] >= _WORTH_KEYS),
        ("SLOTS", _slots(w, update)),
    )


def _slots(w: Tensor, update: Update) -> int:
    """Where in the row keys each stream has its own, a nibble each; `_NO_SLOT` for none."""
    rounds = is_narrow(w.dtype) and update.rounding == "stochastic"
    streams = [WEIGHT] if rounds and update.compensation is None else []
    narrow = [isinstance(s, Tensor) and is_narrow(s.dtype) for s in update.moments]
    streams += [stream for stream, used in zip(STATE_STREAMS, narrow) if used]
    streams += [] if update.compensation is None else [COMPENSATION]
    slots = [streams.index(s) if s in streams else _NO_SLOT for s in range(COMPENSATION + 1)]
    return sum(slot << 4 * stream for stream, slot in enumerate(slots))


def _launch(kind: dict[str, Any], items: Sequence[Item], guard: Tensor | None) -> None:
    device = items[0][0].device
    table: list[int] = []
    held: list[Tensor] = []
    all_rows = 0
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
        table += [update.row_offset, _address(factor, device, held), all_rows]
        all_rows += w.shape[0]
    shapes = tuple((item[0].shape[0], item[0].shape[1]) for item in items)
    streams = sum(kind["SLOTS"] >> 4 * s & 15 != _NO_SLOT for s in range(COMPENSATION + 1))
    sizes = {"FIELDS": _FIELDS, "RECORD": RECORD}
    with torch.cuda.device_of(items[0][0]):
        table_T, records_T = numbers(table, device), records([i[2] for i in items], device)
        keys: Tensor | None = None
        if kind.pop("KEYED") and streams:
            keys = torch.empty((streams, all_rows), dtype=torch.int32, device=device)
            row_blocks = _blocks(tuple((rows, 1) for rows, _ in shapes), _KEY_BLOCK, device)
            _parameter_keys_kernel[(row_blocks.shape[0],)](
                keys, table_T, records_T, row_blocks, all_rows,
                SLOTS=kind["SLOTS"], BLOCK=_KEY_BLOCK, **sizes,
            )  # fmt: skip
        blocks = _blocks(shapes, _BLOCK, device)
        _parameters_kernel[(blocks.shape[0],)](
            table_T, records_T, blocks, keys, guard, all_rows, BLOCK=_BLOCK, **sizes, **kind
        )


def _blocks(shapes: tuple[tuple[int, int], ...], block: int, device: torch.device) -> Tensor:
    """int64 [programs, 4]: for each program its tensor, the number of its block there, and the row
    and column where that begins. Kept from step to step where it is small; what is made in a CUDA
    graph is the graph's."""
    programs = sum(-(-rows * columns // block) for rows, columns in shapes)
    keep = programs <= _KEPT_BLOCKS and not capturing(device)
    return (_kept_blocks if keep else _made_blocks)(shapes, block, device)


def _made_blocks(shapes: tuple[tuple[int, int], ...], block: int, device: torch.device) -> Tensor:
    counts = [-(-rows * columns // block) for rows, columns in shapes]
    each = numbers(counts, device)
    tensors = torch.arange(len(counts), device=device)
    owner = torch.repeat_interleave(tensors, each, output_size=sum(counts))
    first = each.cumsum(0) - each
    blocks = torch.arange(sum(counts), device=device) - first[owner]
    width = numbers([columns for _, columns in shapes], device)[owner]
    start = blocks * block
    return torch.stack((owner, blocks, start // width, start % width), 1)


_kept_blocks = functools.lru_cache(maxsize=64)(_made_blocks)


def _address(factor: Tensor | None, device: torch.device, held: list[Tensor]) -> int:
    """Of a float32 factor on the device, which `held` keeps alive; 0 for none."""
    if factor is None:
        return 0
    held.append(factor.to(device, torch.float32))
    return held[-1].data_ptr()
