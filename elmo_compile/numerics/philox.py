"""Random words that depend only on (seed, parameter, step, stream, row, column).

    row key      = word 0 of Philox4x32-10, key (seed, param_id),
                   counter (row_lo, row_hi, step_lo, stream << 24 | step_hi)
    element word = mix32(row key XOR column)

One Philox a row and a cheap mixer an element: no chunk, shard, thread or device enters. Philox is
int64 arithmetic masked to 32 bits; the mixer is int32 only (Inductor has no uint32), so it
vectorises inside a compiled kernel. Any change of these bits must bump `ROUNDING_VERSION`.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the mixer is
C. Wellons' `lowbias32`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elmo_compile.errors import InputError, OptionError

ROUNDING_VERSION = 1
"""Saved in checkpoints; a checkpoint of another version cannot be continued bit for bit."""

WEIGHT = 0
"""Stream of a weight's rounding."""
MOMENTUM = 1
"""Stream of a momentum buffer, and of Adam's first moment."""
SECOND_MOMENT = 2
"""Stream of Adam's second moment."""
COMPENSATION = 3
"""Stream of a Kahan compensation buffer."""
FEATURES = 4
"""Stream of features rounded to fp8."""
CONVERSION = 5
"""Stream of a weight's conversion from another dtype."""

_MASK32 = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_KEYS_AT_ONCE = 1 << 13
_MIX_A = 0x7FEB352D
_MIX_B = 0x846CA68B - (1 << 32)  # as a signed 32-bit number


class CounterWords(NamedTuple):
    """What is the same for every row of one rounding: four numbers of 32 bits each."""

    seed: int
    """Philox key, word 0."""
    param_id: int
    """Philox key, word 1."""
    step_lo: int
    """Philox counter, word 2: the low 32 bits of the step."""
    stream_step_hi: int
    """Philox counter, word 3: `stream << 24 | step >> 32`."""


def check_int(name: str, value: Any, bits: int) -> int:
    """`value` as an int in `[0, 2^bits)`. Raises OptionError, naming the argument, otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number < 1 << bits:
        raise OptionError(
            f"{name}={value!r} is not accepted: it must be an integer in [0, 2**{bits})"
        )
    return number


def counter_words(seed: int, param_id: int, step: int, stream: int) -> CounterWords:
    """Pack the part of Philox's key and counter that all rows share.

    Args:
        seed: user's seed, 32 bits.
        param_id: stable number of the parameter, 32 bits.
        step: updates this parameter has had, 56 bits.
        stream: which tensor of the parameter (constants of this module), 8 bits.

    Returns:
        Key and counter words, each in [0, 2^32).

    Raises:
        OptionError: a number that is no integer or out of its range.
    """
    step = check_int("step", step, 56)
    return CounterWords(
        seed=check_int("seed", seed, 32),
        param_id=check_int("param_id", param_id, 32),
        step_lo=step & _MASK32,
        stream_step_hi=check_int("stream", stream, 8) << 24 | step >> 32,
    )


def philox4x32(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four random 32-bit words from a counter of four and a key of two.

    `(hi0, lo0) = M0 c0; (hi1, lo1) = M1 c2; c <- (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0)`, ten
    times, with `k <- k + W` between rounds, all modulo 2^32.

    Args:
        counter: four numbers in [0, 2^32): ints, int64 tensors or uint64 arrays that broadcast.
        key: two numbers in [0, 2^32): ints or int64 tensors.

    Returns:
        Four words in [0, 2^32), as what was given (ints where nothing was a tensor or an array).

    Source: Salmon et al., SC 2011; the same words as Random123's `philox4x32`.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 wraps on overflow, which leaves the 64 bits of the unsigned product.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0
        c2 = ((p0 >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = p1 & _MASK32, p0 & _MASK32
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
    return c0, c1, c2, c3


def to_int32(words: Tensor) -> Tensor:
    """int32 tensor with the low 32 bits of an int64 tensor (2^31 and above become negative)."""
    # The sign is moved by arithmetic: a cast out of range is not defined on every device.
    return (((words & _MASK32) ^ 0x80000000) - 0x80000000).to(torch.int32)


def row_keys(seed: int, param_id: int, step: int, stream: int, rows: Tensor) -> Tensor:
    """The 32-bit key of each row: word 0 of Philox4x32-10 of (seed, param_id; row, step, stream).

    Args:
        seed: user's seed, 32 bits.
        param_id: stable number of the parameter, 32 bits.
        step: updates this parameter has had, 56 bits.
        stream: which tensor of the parameter (constants of this module), 8 bits.
        rows: int64, any shape: rows of the unsharded stored tensor, not negative.

    Returns:
        int32, shaped like `rows`, on its device: the keys' bits.

    Raises:
        OptionError: a number that is no integer or out of its range.
        InputError: `rows` is not int64.

    Source: ALGORITHMS.md section 2.
    """
    return row_keys_from_words(counter_words(seed, param_id, step, stream), rows)


def row_keys_from_words(words: Sequence[Any], rows: Tensor) -> Tensor:
    """`row_keys` with the shared words given: `CounterWords`, or four int64 0-d tensors.

    Compiled code should pass tensors, so that a new step is a new value and not a new graph.
    """
    if rows.dtype != torch.int64:
        raise InputError(f"rows must be an int64 tensor of row numbers, got {rows.dtype}")
    seed, param_id, step_lo, stream_step_hi = words
    counter = (rows & _MASK32, (rows >> 32) & _MASK32, step_lo, stream_step_hi)
    return to_int32(philox4x32(counter, (seed, param_id))[0])


def row_keys_in_order(words: Sequence[int], first: int, last: int) -> Tensor:
    """`row_keys` of rows [first, last) on a CPU: int32 [last - first].

    By numpy, which has unsigned words, and in place: 27 ns a row, where the formula above takes 40
    and int64 tensors 120. Compiled it is 2, after two seconds of compiling.
    """
    seed, param_id, step_lo, stream_step_hi = words
    keys = np.empty(max(0, last - first), dtype=np.uint32)
    c0, c1, c2, c3, p0, p1 = np.empty((6, min(keys.size, _KEYS_AT_ONCE)), dtype=np.uint64)
    shift, mask = np.uint64(32), np.uint64(_MASK32)
    for start in range(0, keys.size, _KEYS_AT_ONCE):
        part = keys[start : start + _KEYS_AT_ONCE]
        if part.size < c0.size:
            c0, c1, c2, c3, p0, p1 = (a[: part.size] for a in (c0, c1, c2, c3, p0, p1))
        c1[:] = np.arange(first + start, first + start + part.size, dtype=np.uint64)
        np.bitwise_and(c1, mask, out=c0)
        np.right_shift(c1, shift, out=c1)
        c2.fill(step_lo)
        c3.fill(stream_step_hi)
        k0, k1 = seed, param_id
        for _ in range(10):
            np.multiply(c0, np.uint64(_PHILOX_M[0]), out=p0)
            np.multiply(c2, np.uint64(_PHILOX_M[1]), out=p1)
            for product, high, other, key in ((p1, c0, c1, k0), (p0, c2, c3, k1)):
                np.right_shift(product, shift, out=high)
                np.bitwise_xor(high, other, out=high)
                np.bitwise_xor(high, np.uint64(key), out=high)
            np.bitwise_and(p1, mask, out=c1)
            np.bitwise_and(p0, mask, out=c3)
            k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
        part[:] = c0
    return torch.from_numpy(keys.view(np.int32))


def mix32(h: Tensor) -> Tensor:
    """A bijective mixer of 32-bit words (`lowbias32`), in int32 operations.

    `h ^= h >> 16; h *= 0x7feb352d; h ^= h >> 15; h *= 0x846ca68b; h ^= h >> 16` with unsigned
    shifts: an arithmetic shift whose copies of the sign bit are masked off.

    Args:
        h: int32, any shape.

    Returns:
        int32, same shape.
    """
    return mixed(half_mixed(h))


def half_mixed(h: Tensor) -> Tensor:
    """The first step of `mix32`, int32.

    It is linear: `half_mixed(key ^ d) = half_mixed(key) ^ half_mixed(d)`, and for j below 2^16
    `half_mixed(d ^ j)` is `half_mixed(d) ^ j`. Kernels apply it once a row and once a column.
    """
    return h ^ ((h >> 16) & 0xFFFF)


def mixed(h: Tensor) -> Tensor:
    """The other steps of `mix32`, int32."""
    h = h * _MIX_A
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _MIX_B
    return h ^ ((h >> 16) & 0xFFFF)


def element_words(rowkey: Tensor, d: Tensor) -> Tensor:
    """The random word of each element of some rows and columns: `mix32(rowkey[:, None] ^ d)`.

    Args:
        rowkey: int32 [rows], from `row_keys`.
        d: int32 [D], columns of the unsharded stored tensor (bits of an unsigned number).

    Returns:
        int32 [rows, D]; rounding to a format uses its low `random_bits`.

    Source: ALGORITHMS.md section 2.
    """
    return mix32(rowkey.unsqueeze(-1) ^ d)
