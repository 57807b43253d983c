"""Rounding, decoding and random words of the kernels, bit for bit those of numerics/."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.kernels.triton.device_math import expm1_nonpositive, log1p_unit
from elmo_compile.kernels.triton.random_bits import element_words, row_keys
from elmo_compile.kernels.triton.storage import (
    narrow,
    to_bf16_nearest,
    to_bf16_stochastic,
    to_e4m3_nearest,
    to_e4m3_stochastic,
    widen,
)
from elmo_compile.numerics import philox
from elmo_compile.numerics.formats import format_of
from elmo_compile.numerics.rounding import round_nearest, round_stochastic_bits

FP8 = torch.float8_e4m3fn
BLOCK = 4096


@triton.jit
def _round_kernel(v_ptr, word_ptr, out_ptr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(v_ptr + i)
    word = tl.load(word_ptr + i).to(tl.uint32, bitcast=True)
    if out_ptr.dtype.element_ty == tl.uint8:
        out = to_e4m3_stochastic(v, word) if STOCHASTIC else to_e4m3_nearest(v)
    else:
        out = to_bf16_stochastic(v, word) if STOCHASTIC else to_bf16_nearest(v)
    tl.store(out_ptr + i, out)


@triton.jit
def _narrow_kernel(v_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, narrow(tl.load(v_ptr + i), out_ptr.dtype.element_ty))


@triton.jit
def _widen_kernel(v_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, widen(tl.load(v_ptr + i)))


@triton.jit
def _words_kernel(
    out_ptr, first_row: tl.int64, seed: tl.int32, param: tl.int32, word2: tl.int32, word3: tl.int32,
    L: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = first_row.to(tl.int64) + tl.arange(0, L)
    d = tl.arange(0, D)
    words = element_words(row_keys(row, seed, param, word2, word3), d)
    offsets = tl.arange(0, L)[:, None] * D + d[None, :]
    tl.store(out_ptr + offsets, words.to(tl.int32, bitcast=True))


@triton.jit
def _maths_kernel(v_ptr, out_ptr, BLOCK: tl.constexpr, WHICH: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(v_ptr + i)
    tl.store(out_ptr + i, log1p_unit(v) if WHICH == "log1p" else expm1_nonpositive(v))


def values(device: str) -> Tensor:
    """Every cell boundary of E4M3, what lies beside them, all exponents, and what is special."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    finite = codes[torch.isfinite(codes)]
    near = torch.cat([finite * (1 + k * 2.0**-20) for k in range(-3, 4)])
    between = finite[:-1] + (finite[1:] - finite[:-1]) * 0.5
    exponents = torch.tensor([s * 2.0**e for e in range(-149, 128) for s in (1, -1)])
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-45]
        + [448.0, 464.0, 465.0, 1e4, -480.0, 2**-10, 2**-10 * 1.0001, 3.3895e38]
    )
    torch.manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int32).view(torch.float32)
    normal = torch.cat([torch.randn(20000) * s for s in (0.02, 1.0, 100.0)])
    v = torch.cat([near, between, exponents, special, patterns, normal])
    return torch.nn.functional.pad(v, (0, -len(v) % BLOCK)).to(device)


def stored_bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8 if t.element_size() == 1 else torch.int16).cpu()


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_rounding_is_the_specification_s(dtype: torch.dtype, stochastic: bool, device: str) -> None:
    v = values(device)
    words = torch.randint(-(2**31), 2**31 - 1, v.shape, dtype=torch.int32).to(device)
    words[: len(v) // 4] = 0
    words[len(v) // 4 : len(v) // 2] = -1
    out = torch.empty(v.shape, dtype=torch.uint8 if dtype == FP8 else dtype, device=device)
    _round_kernel[(len(v) // BLOCK,)](v, words, out, STOCHASTIC=stochastic, BLOCK=BLOCK)
    if stochastic:
        expected = round_stochastic_bits(v.cpu(), words.cpu(), format_of(dtype)).to(dtype)
    else:
        expected = round_nearest(v.cpu(), dtype)
    got, wanted = stored_bits(out), stored_bits(expected)
    nan = torch.isnan(v.cpu())
    assert torch.equal(got[~nan], wanted[~nan])
    assert (got[nan] == (0x7F if dtype == FP8 else 0x7FC0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_are_rounded_to_nearest(dtype: torch.dtype, device: str) -> None:
    v = values(device)
    v = v[v.abs() < 6e4]
    v = torch.nn.functional.pad(v, (0, -len(v) % BLOCK))
    out = torch.empty(v.shape, dtype=dtype, device=device)
    _narrow_kernel[(len(v) // BLOCK,)](v, out, BLOCK=BLOCK)
    assert torch.equal(out, v.to(dtype))


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float16, torch.float32])
def test_stored_values_are_read_exactly(dtype: torch.dtype, device: str) -> None:
    integer = torch.uint8 if dtype == FP8 else torch.int16
    stored = torch.arange(256 if dtype == FP8 else 65536, dtype=torch.int32).to(integer)
    stored = torch.randn(512) if dtype == torch.float32 else stored.view(dtype)
    given = (stored.view(torch.uint8) if dtype == FP8 else stored).to(device)
    out = torch.empty(given.shape, device=device)
    _widen_kernel[(1,)](given, out, BLOCK=len(given))
    torch.testing.assert_close(out.cpu(), stored.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("row", [0, 77, 2**31 - 3, 2**32 - 2, 2**40 + 5])
@pytest.mark.parametrize(
    ("seed", "param", "step", "stream"),
    [(0, 0, 0, 0), (2**32 - 1, 2**31, 2**32 + 3, 1), (7, 5, 2**55 + 1, 5)],
)
def test_random_words_are_the_specification_s(
    row: int, seed: int, param: int, step: int, stream: int, device: str
) -> None:
    L, D = 4, 64
    words = philox.counter_words(seed, param, step, stream)
    out = torch.empty(L, D, dtype=torch.int32, device=device)
    signed = [w - (1 << 32) if w >= 1 << 31 else w for w in words]
    _words_kernel[(1,)](out, row, *signed, L=L, D=D)
    keys = philox.row_keys(seed, param, step, stream, torch.arange(row, row + L))
    expected = philox.element_words(keys, torch.arange(D, dtype=torch.int32))
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize(("which", "low", "high"), [("log1p", 0.0, 1.0), ("expm1", -40.0, 0.0)])
def test_series_are_accurate_to_a_few_ulps(
    which: str, low: float, high: float, device: str
) -> None:
    spread = torch.linspace(low, high, 3 * BLOCK // 4, dtype=torch.float64)
    tiny = (high or -1.0) * 2.0 ** -torch.linspace(0, 60, BLOCK // 4, dtype=torch.float64)
    v = torch.cat([spread, tiny]).float().to(device)
    out = torch.empty_like(v)
    _maths_kernel[(1,)](v, out, BLOCK=BLOCK, WHICH=which)
    expected = torch.log1p(v.double()) if which == "log1p" else torch.expm1(v.double())
    # A GPU's exp2 is good to two ulps, and near -0.5 the 1 that is taken off doubles that.
    rtol = 4e-7 if device == "cpu" else 6e-7
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=0)
