"""Rounding float32 values to a narrow format: stochastically (given the bits) and to nearest.

The map is a pure function of a value and a random word. For finite v between neighbours
`lo <= v <= hi` of the format, subnormals included, it returns hi for a share `(v-lo)/(hi-lo)` of
all words and lo for the others. It is int32 arithmetic on the float32 bit pattern, so it compiles
into vector code; the float32 results lie on the format's grid, so the cast that stores them is
exact and can stay outside the compiled kernel. Source: ALGORITHMS.md section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from elmo_compile.errors import InputError, OptionError
from elmo_compile.numerics.formats import StorageFormat, format_of
from elmo_compile.numerics.philox import (
    CounterWords,
    check_int,
    counter_words,
    element_words,
    row_keys_from_words,
    to_int32,
)

_SIGN = -(1 << 31)
_MAGNITUDE = (1 << 31) - 1
_INF = 0x7F800000
_NAN = 0x7FC00000
_FP8_NAN = 0x7F
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOAT32_MAX = torch.finfo(torch.float32).max
_CPU_BLOCK = 1 << 17
_DEVICE_BLOCK = 1 << 22


def _bits(value: float) -> int:
    """Bit pattern of a positive value that float32 holds exactly."""
    mantissa, exponent = math.frexp(value)
    return (exponent + 126) << 23 | int((2 * mantissa - 1) * (1 << 23))


def round_stochastic_bits(v: Tensor, r: Tensor, fmt: StorageFormat) -> Tensor:
    """Round float32 values to the grid of a format with given random words.

    `a = min(|v|, MAX)`; below `min_normal` of an fp8 format `a += shift`; add the low n bits of r
    to a's bit pattern and clear them; subtract the shift; give back v's sign. Exact values, -0 and
    the sign of an underflow are kept; NaN gives the canonical NaN; bf16 keeps infinities, fp8
    saturates them. The share of words that rounds away from zero is `(|v|-lo)/(hi-lo)` exactly,
    except below fp8's `min_normal`, where |v| is first rounded to 2^-n of a step.

    Args:
        v: float32, any shape.
        r: int32, shape that broadcasts with v; only the low `fmt.random_bits` are used.
        fmt: the target format.

    Returns:
        float32 values on the format's grid, so that a cast to `fmt.dtype` is exact.

    Source: ALGORITHMS.md section 2.
    """
    bits = v.view(torch.int32)
    noise = r & fmt.random_mask
    if not fmt.shift:
        # Integers throughout: compiled code may flush float32's subnormals, which bf16 has. A
        # finite number is not rounded up beyond the largest; an infinity stays what it is.
        a = bits & _MAGNITUDE
        q = torch.minimum(a + noise, a.clamp_min(_INF - 1)) & ~fmt.random_mask
        return torch.where(v != v, _NAN, q | (bits & _SIGN)).view(torch.float32)
    size = v.abs()
    shift = torch.where(size < fmt.min_normal, fmt.shift, torch.zeros_like(size))
    a = (size.clamp_max(fmt.max) + shift).view(torch.int32)
    q = (a + noise) & ~fmt.random_mask
    q = (q.view(torch.float32) - shift).view(torch.int32)
    q = torch.where(v != v, _NAN, q | (bits & _SIGN))
    return q.view(torch.float32)


def fp8_codes_stochastic(v: Tensor, r: Tensor, fmt: StorageFormat) -> Tensor:
    """The bytes of `round_stochastic_bits(v, r, fmt)`, without the way back to float32.

    With or without the shift, a rounded bit pattern is the code at some distance: both count steps
    of the format. Below `min_normal` the one without counts fewer, from there on the other, so the
    larger is right. Few casts between float and bits and few selections: where Inductor compiled
    them for a CPU, the former go through memory, and the latter make vectors of their masks.

    Args:
        v: float32. r: int32 random words. fmt: an fp8 format.

    Returns:
        int32 in [0, 256): the byte of `fmt.dtype`.
    """
    noise, n = r & fmt.random_mask, fmt.random_bits
    a, shifted = v.view(torch.int32) & _MAGNITUDE, (v.abs() + fmt.shift).view(torch.int32)
    normal = ((a + noise) >> n) - _code_zero(fmt)
    subnormal = ((shifted + noise) >> n) - (_bits(fmt.min_normal) >> n)
    return _fp8_code(torch.maximum(normal, subnormal), v, fmt)


def fp8_codes_nearest(v: Tensor, fmt: StorageFormat) -> Tensor:
    """The bytes of `round_nearest(v, fmt.dtype)`, on bits.

    Args:
        v: float32. fmt: an fp8 format.

    Returns:
        int32 in [0, 256): the byte of `fmt.dtype`.
    """
    size, n = v.abs(), fmt.random_bits
    a = size.view(torch.int32)
    normal = ((a + ((1 << (n - 1)) - 1) + ((a >> n) & 1)) >> n) - _code_zero(fmt)
    # Below min_normal the step is constant: it is the last bit of this sum, which rounds to it.
    magic = fmt.min_step * 2.0**23
    small = (size.clamp_max(fmt.min_normal) + magic).view(torch.int32) - _bits(magic)
    return _fp8_code(torch.where(size < fmt.min_normal, small, normal), v, fmt)


def _code_zero(fmt: StorageFormat) -> int:
    """What a code of a normal number is counted from, in steps of float32's bit pattern."""
    return (_bits(fmt.min_normal) >> fmt.random_bits) - (1 << fmt.mantissa_bits)


def _fp8_code(code: Tensor, v: Tensor, fmt: StorageFormat) -> Tensor:
    """A code of |v| saturated, with v's sign; the canonical NaN where v is one."""
    largest = (_bits(fmt.max) >> fmt.random_bits) - _code_zero(fmt)
    sign = (v.view(torch.int32) >> 24) & 0x80
    return torch.where(v != v, _FP8_NAN, code.clamp_max(largest) | sign)


def nearest_on_grid(v: Tensor, fmt: StorageFormat) -> Tensor:
    """Round float32 values to the grid of a format, to nearest even: `round_nearest` in float32.

    On bits, with no narrow tensor in between: a compiler may leave out a cast to bf16 and back, and
    what was to be the rounding error of a weight is then 0.

    Args:
        v: float32, any shape.
        fmt: the target format.

    Returns:
        float32 values on the format's grid.
    """
    bits = v.view(torch.int32)
    n = fmt.random_bits
    if fmt.shift:
        a = v.abs().clamp_max(fmt.max)
        code = a.view(torch.int32)
        # Below min_normal the step is constant: this sum has it as its last bit, and rounds to it.
        magic = fmt.min_step * 2.0**23
        small = ((a + magic) - magic).view(torch.int32)
    else:
        code = (bits & _MAGNITUDE).clamp_max(_bits(fmt.max))
        small = None
    q = (code + ((1 << (n - 1)) - 1) + ((code >> n) & 1)) & ~fmt.random_mask
    if small is not None:
        q = torch.where(code < _bits(fmt.min_normal), small, q)
    if fmt.keeps_inf:
        q = torch.where((bits & _MAGNITUDE) == _INF, _INF, q)
    q = torch.where(v != v, _NAN, q | (bits & _SIGN))
    return q.view(torch.float32)


def round_nearest(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest value of a format, ties to even, saturating finite overflow.

    `sign(v) min(RN(|v|), MAX)`; NaN, infinities and zeros as in `round_stochastic_bits`.

    Args:
        v: float32, bfloat16 or float16, any shape; float64 is first rounded to float32.
        dtype: torch.bfloat16, torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        Tensor of `dtype`, shaped like v.

    Raises:
        OptionError: no such format.
        InputError: v is not floating point, or is fp8 already.
    """
    fmt = format_of(dtype)
    v = _as_float32(_check_values(v))
    clamped = v.clamp(-fmt.max, fmt.max)
    if fmt.keeps_inf:
        clamped = torch.where(v.abs() == math.inf, v, clamped)
    return torch.where(v != v, math.nan, clamped).to(dtype)


def stochastic_round(
    x: Tensor,
    dtype: torch.dtype,
    *,
    seed: int,
    param_id: int = 0,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
) -> Tensor:
    """Round a tensor to a narrow format so that its expected value is kept.

    `hi with probability (x - lo)/(hi - lo), else lo`, with random bits that depend only on the
    arguments and each element's position: pieces rounded with their offsets are bit for bit the
    whole, on every device. No gradient flows. Temporaries stay bounded however large x is.

    Args:
        x: float32, bfloat16, float16 or float64 (first rounded to float32: a bias of at most 2^-17
            step for bf16, 2^-21 for E4M3). [rows, D], or [..., D] which counts as
            [prod(leading), D], or [D] which counts as one row, row 0, as does a scalar.
        dtype: torch.bfloat16, torch.float8_e4m3fn or torch.float8_e5m2.
        seed: integer in [0, 2^32).
        param_id: which parameter, integer in [0, 2^32).
        stream: which tensor of that parameter, integer in [0, 2^8); `numerics.philox` names them.
        step: integer in [0, 2^56); roundings of one tensor need different steps.
        offset: position of x in the whole tensor: its first row, or for [D] and a scalar its first
            element. Rows end below 2^63, elements of a row at 2^32.

    Returns:
        Contiguous tensor of `dtype`, shaped like x, on its device, without gradient.

    Raises:
        OptionError: unknown dtype; a number that is no integer or out of its range.
        InputError: x is not a dense floating-point tensor of one of the dtypes above.

    Source: ALGORITHMS.md section 2; ELMO (arXiv 2510.11168) without its bias below 2^-6.
    """
    fmt = format_of(dtype)
    words = counter_words(seed, param_id, step, stream)
    x = _check_values(x).detach()
    one_row = x.dim() < 2
    columns = x.numel() if one_row else x.shape[-1]
    row0, column0 = (0, offset) if one_row else (offset, 0)
    row0, column0 = check_int("offset", row0, 63), check_int("offset", column0, 32)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    x_RD, out_RD = x.reshape(-1, columns), out.view(-1, columns)
    if column0 + columns > 1 << 32 or row0 + x_RD.shape[0] > (1 << 63) - 1:
        raise OptionError(
            f"offset={offset} with a tensor of shape {tuple(x.shape)} runs past the counter: rows "
            "end below 2**63, elements of a row at 2**32. Give long 1-D tensors as rows."
        )
    block = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
    for r0, r1, d0, d1 in _blocks(x_RD.shape[0], columns, block):
        piece = _as_float32(x_RD[r0:r1, d0:d1])
        r = _words_of(words, (row0 + r0, row0 + r1), (column0 + d0, column0 + d1), x.device)
        out_RD[r0:r1, d0:d1] = round_stochastic_bits(piece, r, fmt).to(dtype)
    return out


def _words_of(
    words: CounterWords, rows: tuple[int, int], columns: tuple[int, int], device: torch.device
) -> Tensor:
    """int32 random words of the elements in `[rows) x [columns)`."""
    row = torch.arange(*rows, dtype=torch.int64, device=device)
    d = to_int32(torch.arange(*columns, dtype=torch.int64, device=device))
    return element_words(row_keys_from_words(words, row), d)


def _blocks(rows: int, columns: int, block: int) -> Iterator[tuple[int, int, int, int]]:
    """Cover [rows, columns] with pieces of at most `block` elements: (r0, r1, d0, d1)."""
    tall, wide = max(1, block // columns), min(columns, block)
    for r0 in range(0, rows, tall):
        for d0 in range(0, columns, wide):
            yield r0, min(r0 + tall, rows), d0, min(d0 + wide, columns)


def _check_values(x: Any) -> Tensor:
    """x itself if it holds values that can be rounded. Raises InputError otherwise."""
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor to round, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        accepted = ", ".join(str(dtype) for dtype in _FLOATS)
        raise InputError(
            f"cannot round a tensor of dtype {x.dtype}; accepted are {accepted}. "
            "Integers and fp8 values are exact already: cast them with `.to()`."
        )
    if x.layout != torch.strided:
        raise InputError(
            f"cannot round a tensor of layout {x.layout}; densify it with `.to_dense()`"
        )
    return x


def _as_float32(x: Tensor) -> Tensor:
    """x in float32; finite float64 values past its range become its largest, not infinite."""
    if x.dtype == torch.float64:
        x = torch.where(x.abs() == math.inf, x, x.clamp(-_FLOAT32_MAX, _FLOAT32_MAX))
    return x.to(torch.float32)
