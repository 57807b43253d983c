"""The random word of a stored element, bit for bit numerics/philox.py.

row key      = word 0 of Philox4x32-10, key (seed, param), counter (row_lo, row_hi, word2, word3)
element word = mix32(row key XOR column)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.device_math import ceil_div
from elmo_compile.kernels.triton.records import word
from elmo_compile.numerics.formats import is_narrow
from elmo_compile.numerics.philox import COMPENSATION, WEIGHT
from elmo_compile.numerics.update import STATE_STREAMS, Update


@triton.jit
def row_keys(row, seed, param, word2, word3):
    """uint32 keys of rows (integers, any shape); the other words are int32 scalars."""
    row = row.to(tl.int64)
    c0 = row.to(tl.uint32)
    c1 = (row >> 32).to(tl.uint32)
    zero = c0 ^ c0
    c2 = zero + word2.to(tl.uint32, bitcast=True)
    c3 = zero + word3.to(tl.uint32, bitcast=True)
    k0 = zero + seed.to(tl.uint32, bitcast=True)
    k1 = zero + param.to(tl.uint32, bitcast=True)
    m0 = zero + 0xD2511F53
    m1 = zero + 0xCD9E8D57
    w0 = zero + 0x9E3779B9
    w1 = zero + 0xBB67AE85
    for _ in tl.static_range(10):
        hi0, hi1 = tl.umulhi(m0, c0), tl.umulhi(m1, c2)
        lo0, lo1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 += w0
        k1 += w1
    return c0


@triton.jit
def _half_mixed(h):
    """The first step of `mix32`: linear, so a key and a column can take it apart."""
    return h ^ (h >> 16)


@triton.jit
def _mixed(h):
    """The other steps of `mix32`."""
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def mix32(h):
    """A bijective mixer of uint32 words."""
    return _mixed(_half_mixed(h))


@triton.jit
def element_words(keys_L, columns_D):
    """uint32 [L, D] words of elements from uint32 row keys and int32 columns."""
    columns = _half_mixed(columns_D.to(tl.uint32))
    return _mixed(_half_mixed(keys_L)[:, None] ^ columns[None, :])


@triton.jit(do_not_specialize=["first_row"])
def _row_keys_kernel(
    keys_ptr,
    record_ptr,
    L,
    first_row: tl.int64,
    STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys[s, l]: the key of row `first_row + l` for the stream in the s-th nibble of STREAMS."""
    blocks = ceil_div(L, BLOCK)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    slot = tl.program_id(0) // blocks
    stream = (STREAMS >> (4 * slot)) & 15
    rows = first_row.to(tl.int64) + at
    word3 = word(record_ptr, 3) + (stream << 24)
    keys = row_keys(rows, word(record_ptr, 0), word(record_ptr, 1), word(record_ptr, 2), word3)
    tl.store(keys_ptr + slot.to(tl.int64) * L + at, keys.to(tl.int32, bitcast=True), mask=at < L)


assert WEIGHT == 0, "the other streams are added to the weight's word"


class RowKeys:
    """The row keys of a chunk, for every stream that an update rounds stochastically.

    A kernel of their own: an update's threads hold few elements of many rows, and ten rounds of
    Philox for each would cost a fifth of the kernel (counted in its code).
    """

    def __init__(self, w_LD: Tensor, update: Update, record: Tensor) -> None:
        """record: of the update (`records.py`)."""
        narrow = is_narrow(w_LD.dtype) and update.rounding == "stochastic"
        states = [isinstance(s, Tensor) and is_narrow(s.dtype) for s in update.moments]
        used = [WEIGHT] if narrow else []
        used += [stream for stream, rounded in zip(STATE_STREAMS, states) if rounded]
        if update.compensation is not None:
            used.append(COMPENSATION)
        self._used, self._row_offset, self._record = used, update.row_offset, record
        self._streams = sum(stream << 4 * slot for slot, stream in enumerate(used))

    def of(self, start: int, stop: int) -> list[Tensor | None]:
        """int32 [stop - start] for each of the streams WEIGHT, `STATE_STREAMS`, COMPENSATION; None
        where nothing is rounded stochastically."""
        found: list[Tensor | None] = [None] * (COMPENSATION + 1)
        if not self._used:
            return found
        L, block = stop - start, 256
        keys = torch.empty((len(self._used), L), dtype=torch.int32, device=self._record.device)
        _row_keys_kernel[(len(self._used) * -(-L // block),)](
            keys,
            self._record,
            L=L,
            first_row=self._row_offset + start,
            STREAMS=self._streams,
            BLOCK=block,
            num_warps=4,
        )
        for slot, stream in enumerate(self._used):
            found[stream] = keys[slot]
        return found
