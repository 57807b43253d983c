"""The public rounding functions: position, pieces, shapes, dtypes, specials, compiled, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from elmo_compile.errors import InputError, OptionError
from elmo_compile.numerics import rounding
from elmo_compile.numerics.formats import BF16, E4M3, E5M2, FORMATS, format_of
from elmo_compile.numerics.philox import counter_words, element_words, row_keys
from elmo_compile.numerics.rounding import round_nearest, round_stochastic_bits, stochastic_round

DTYPES = [fmt.dtype for fmt in FORMATS]
INF, NAN = math.inf, math.nan


def by_name(fmt):
    return fmt.name


def same(a, b):
    """Bit for bit, so that NaN equals NaN and -0 differs from 0."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.tolist().__repr__() == b.tolist().__repr__()
    )


def normal(*shape, seed=0, scale=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_is_the_map_applied_to_the_words_of_each_position(fmt):
    x = normal(7, 11)
    keys = row_keys(1, 2, 3, 4, torch.arange(2**40, 2**40 + 7))
    r = element_words(keys, torch.arange(11, dtype=torch.int32))
    got = stochastic_round(x, fmt.dtype, seed=1, param_id=2, step=3, stream=4, offset=2**40)
    assert same(got, round_stochastic_bits(x, r, fmt).to(fmt.dtype))


VERSION_1 = {  # made by a scalar program in Python integers and fractions, not by this package
    BF16: [[-17244, -17281, -17354, -17445, -17646], [15122, 15322, 15414, 15487, 15524]],
    E4M3: [[-118, -120, -122, -125, -127], [1, 3, 5, 8, 11]],
    E5M2: [[-91, -92, -95, -97, -103], [25, 31, 33, 36, 37]],
}


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_the_bits_of_version_1(fmt):
    """Pinned: if these change, ROUNDING_VERSION must."""
    x = torch.tensor([[-9, -7, -5, -3, -1], [1, 3, 5, 7, 9]]) / 450.0
    numbers = {"seed": 1, "param_id": 2, "step": 3, "stream": 4, "offset": 2**33}
    codes = stochastic_round(x, fmt.dtype, **numbers)
    assert codes.view(torch.int16 if fmt is BF16 else torch.int8).tolist() == VERSION_1[fmt]


@pytest.mark.parametrize("other", ["seed", "param_id", "step", "stream", "offset"])
def test_every_argument_changes_the_bits(other):
    x = normal(32, 64)
    a = stochastic_round(x, torch.bfloat16, seed=0)
    b = stochastic_round(x, torch.bfloat16, **{"seed": 0, other: 1})
    assert 0.2 < (a != b).float().mean().item() < 0.5  # 2 p (1 - p) on average over p: one third
    assert same(a, stochastic_round(x, torch.bfloat16, seed=0))


# Pieces


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    fmt=st.sampled_from(FORMATS),
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    cut=st.integers(0, 12),
    offset=st.integers(0, 2**63 - 100),
)
def test_row_pieces_equal_the_whole(fmt, rows, columns, cut, offset):
    x = normal(rows, columns)
    whole = stochastic_round(x, fmt.dtype, seed=9, offset=offset)
    cut = min(cut, rows)
    pieces = [
        stochastic_round(x[:cut], fmt.dtype, seed=9, offset=offset),
        stochastic_round(x[cut:], fmt.dtype, seed=9, offset=offset + cut),
    ]
    assert same(torch.cat([p.float() for p in pieces]).to(fmt.dtype), whole)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.integers(0, 300), cut=st.integers(0, 300), offset=st.integers(0, 2**32 - 300))
def test_element_pieces_of_one_row_equal_the_whole(size, cut, offset):
    x = normal(size)
    whole = stochastic_round(x, torch.bfloat16, seed=9, offset=offset)
    cut = min(cut, size)
    a = stochastic_round(x[:cut], torch.bfloat16, seed=9, offset=offset)
    b = stochastic_round(x[cut:], torch.bfloat16, seed=9, offset=offset + cut)
    assert same(torch.cat([a, b]), whole)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("shape", [(1000,), (50, 20), (3, 5, 33), (1, 999), (999, 1)])
def test_the_block_of_the_walk_does_not_show(monkeypatch, block, shape):
    x = normal(*shape)
    whole = stochastic_round(x, torch.float8_e4m3fn, seed=3, offset=5)
    monkeypatch.setattr(rounding, "_CPU_BLOCK", block)
    assert same(stochastic_round(x, torch.float8_e4m3fn, seed=3, offset=5), whole)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor any operation makes, views aside."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and "copy_" not in str(func):
            self.elements.append(out.numel())
        return out


@pytest.mark.parametrize("shape", [(2**11, 2**9), (1, 2**20), (2**20,), (2**20, 1)])
def test_temporaries_are_bounded(shape):
    x = torch.zeros(shape)
    with LargestResult() as largest:
        stochastic_round(x, torch.float8_e5m2, seed=0)
    first, second = sorted(largest.elements)[-1:-3:-1]
    assert first == 2**20  # the result
    assert second <= rounding._CPU_BLOCK


# Shapes, layouts, dtypes


def test_one_dimension_is_row_zero_and_leading_dimensions_are_rows():
    x = normal(4, 3, 5)
    flat = stochastic_round(x.reshape(12, 5), torch.bfloat16, seed=1, offset=7)
    assert same(stochastic_round(x, torch.bfloat16, seed=1, offset=7), flat.view(4, 3, 5))
    row = stochastic_round(x[0, :1], torch.bfloat16, seed=1)
    assert same(stochastic_round(x[0, 0], torch.bfloat16, seed=1), row[0])
    shifted = stochastic_round(x[0, 0, 2:], torch.bfloat16, seed=1, offset=2)
    assert same(shifted, row[0, 2:])
    scalar = stochastic_round(x[0, 0, 2], torch.bfloat16, seed=1, offset=2)
    assert same(scalar, row[0, 2])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty_tensors(shape):
    out = stochastic_round(torch.empty(shape), torch.float8_e4m3fn, seed=0)
    assert out.shape == shape
    assert out.dtype == torch.float8_e4m3fn


def test_strides_do_not_matter_and_the_result_is_contiguous_without_gradient():
    x = normal(6, 10).requires_grad_()
    expected = stochastic_round(x.t().contiguous(), torch.bfloat16, seed=1)
    got = stochastic_round(x.t(), torch.bfloat16, seed=1)
    assert same(got, expected)
    assert got.is_contiguous()
    assert not got.requires_grad
    expanded = normal(1, 10).expand(6, 10)
    assert same(
        stochastic_round(expanded, torch.bfloat16, seed=1),
        stochastic_round(expanded.contiguous(), torch.bfloat16, seed=1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float64, torch.bfloat16, torch.float16])
def test_other_input_dtypes_are_rounded_as_their_float32_value(source, dtype):
    x = normal(9, 17).to(source)
    expected = stochastic_round(x.float(), dtype, seed=1)
    assert same(stochastic_round(x, dtype, seed=1), expected)


def test_float64_past_float32_is_finite_and_infinity_is_not():
    x = torch.tensor([1e300, -1e300, INF, -INF, NAN, 1e-300], dtype=torch.float64)
    bf16 = [BF16.max, -BF16.max, INF, -INF, NAN, 0.0]
    assert stochastic_round(x, torch.bfloat16, seed=0).tolist().__repr__() == repr(bf16)
    assert round_nearest(x, torch.bfloat16).tolist().__repr__() == repr(bf16)
    e4m3 = [448.0, -448.0, 448.0, -448.0, NAN, 0.0]
    assert stochastic_round(x, torch.float8_e4m3fn, seed=0).tolist().__repr__() == repr(e4m3)


def test_fake_tensors_give_shape_and_dtype():
    with FakeTensorMode():
        out = stochastic_round(torch.empty(3, 5), torch.float8_e4m3fn, seed=0)
    assert (out.shape, out.dtype) == ((3, 5), torch.float8_e4m3fn)


# What a rounded value may be


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    fmt=st.sampled_from(FORMATS),
    v=st.floats(width=32, allow_nan=False, allow_infinity=False),
    scale=st.sampled_from([0, -100, -130]),
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=6),
)
def test_result_is_a_neighbour_odd_in_the_value_and_grows_with_the_word(fmt, v, scale, words):
    v = torch.tensor([math.ldexp(v, scale)], dtype=torch.float32)
    mask = fmt.random_mask
    r = torch.tensor(sorted(words, key=lambda w: w & mask), dtype=torch.int32)
    got = round_stochastic_bits(v, r, fmt)
    mirrored = round_stochastic_bits(-v, r, fmt)
    assert torch.equal(
        got.view(torch.int32) ^ mirrored.view(torch.int32), torch.full_like(r, _SIGN)
    )
    assert same(got.to(fmt.dtype).float(), got)
    size = got.abs()
    assert (size.diff() >= 0).all()
    a = v.abs().double().clamp(max=fmt.max)
    step = 2.0 ** (max(math.frexp(a.item())[1] - 1, _exponent(fmt)) - fmt.mantissa_bits)
    assert ((size.double() - a).abs() < step).all()


_SIGN = -(2**31)


def _exponent(fmt):
    return math.frexp(fmt.min_normal)[1] - 1


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_specials_through_the_public_functions(fmt):
    top = INF if fmt.keeps_inf else fmt.max
    x = [NAN, INF, -INF, 0.0, -0.0, fmt.max, -fmt.max, 3.4028234663852886e38, fmt.min_step]
    expected = [NAN, top, -top, 0.0, -0.0, fmt.max, -fmt.max, fmt.max, fmt.min_step]
    for got in (
        stochastic_round(torch.tensor(x), fmt.dtype, seed=0),
        round_nearest(torch.tensor(x), fmt.dtype),
    ):
        assert got.tolist().__repr__() == repr(expected)


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_no_value_ever_rounds_to_infinity(fmt):
    below = fmt.max - fmt.max * 2.0 ** -(fmt.mantissa_bits + 2)
    for v in (below, fmt.max, fmt.max * (1 + 2.0**-11)):
        if v > torch.finfo(torch.float32).max:
            continue
        got = stochastic_round(torch.full((64, 64), v), fmt.dtype, seed=0).float()
        assert got.isfinite().all()
        assert got.max().item() == fmt.max


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=by_name)
def test_nearest_is_nearest_with_ties_to_even(fmt):
    grid = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).double()
    grid = grid[grid.isfinite()]
    lo, hi, even = grid[:-1], grid[1:], torch.arange(len(grid) - 1) % 2 == 0
    for fraction, expected in (
        (0.0, lo),
        (0.499, lo),
        (0.5, torch.where(even, lo, hi)),
        (0.501, hi),
    ):
        v = (lo + (hi - lo) * fraction).float()
        assert torch.equal(round_nearest(v, fmt.dtype).double(), expected)
        assert torch.equal(round_nearest(-v, fmt.dtype).double(), -expected)


def test_nearest_bf16_is_torch_within_range():
    v = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(3))
    v = v.int().view(torch.float32)
    v = v[v.abs() <= BF16.max]
    got = round_nearest(v, torch.bfloat16)
    assert torch.equal(got.view(torch.int16), v.bfloat16().view(torch.int16))


# Compiled


def test_compiled_rounding_gives_the_same_bits():
    """Inductor's kernel for the words and the map, its tail included, specials and small values."""
    keys = row_keys(1, 2, 3, 0, torch.arange(13))
    d = torch.arange(77, dtype=torch.int32)
    x = normal(13, 77)
    specials = [NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 1e39, 2.0**-30, 448.0, 449.0, 6e4]
    x[3, : len(specials)] = torch.tensor(specials)
    x[:, -1] = x[3, :13]
    x[:, 50:60] *= 1e-36

    def update(x, half, keys, d):
        r = element_words(keys, d)
        return [round_stochastic_bits(y, r, fmt) for fmt in FORMATS for y in (x, half.float())]

    compiled = torch.compile(update, dynamic=False)(x, x.bfloat16(), keys, d)
    for got, expected in zip(compiled, update(x, x.bfloat16(), keys, d)):
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


# Errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, "bf16"])
def test_unknown_dtype(dtype):
    for round_it in (
        lambda x: stochastic_round(x, dtype, seed=0),
        lambda x: round_nearest(x, dtype),
    ):
        with pytest.raises(OptionError, match=r"torch\.float8_e4m3fn"):
            round_it(torch.zeros(2))


@pytest.mark.parametrize("bad", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_values_that_need_no_rounding_are_refused(bad):
    x = torch.zeros(2).to(bad)
    for round_it in (
        lambda: stochastic_round(x, torch.bfloat16, seed=0),
        lambda: round_nearest(x, torch.bfloat16),
    ):
        with pytest.raises(InputError, match=str(bad).replace(".", r"\.")):
            round_it()


def test_not_a_dense_tensor():
    with pytest.raises(InputError, match="list"):
        stochastic_round([1.0], torch.bfloat16, seed=0)
    with pytest.raises(InputError, match="to_dense"):
        stochastic_round(torch.eye(2).to_sparse(), torch.bfloat16, seed=0)


@pytest.mark.parametrize(
    ("name", "limit"), [("seed", 2**32), ("param_id", 2**32), ("step", 2**56), ("stream", 256)]
)
@pytest.mark.parametrize("value", [-1, 0.5, True, None, "limit"])
def test_counters_out_of_range(name, limit, value):
    value = limit if value == "limit" else value
    with pytest.raises(OptionError, match=name):
        stochastic_round(torch.zeros(2), torch.bfloat16, **{"seed": 0, name: value})


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((2,), 2**32 - 1), ((2,), 2**32), ((), 2**32), ((2, 2), 2**63 - 2), ((2, 2), 2**63)],
)
def test_offsets_past_the_counter(shape, offset):
    with pytest.raises(OptionError, match="offset"):
        stochastic_round(torch.zeros(shape), torch.bfloat16, seed=0, offset=offset)


@pytest.mark.parametrize(("shape", "offset"), [((2,), 2**32 - 2), ((2, 2), 2**63 - 3)])
def test_the_last_offsets_work(shape, offset):
    ones = torch.ones(shape)
    out = stochastic_round(ones, torch.bfloat16, seed=0, offset=offset)
    assert torch.equal(out.float(), ones)


def test_integers_of_numpy_are_integers():
    assert counter_words(np.int64(3), np.uint32(4), 0, 0)[:2] == (3, 4)
    x = normal(4, 4)
    same_bits = stochastic_round(x, torch.bfloat16, seed=np.int64(3))
    assert same(same_bits, stochastic_round(x, torch.bfloat16, seed=3))
    assert format_of(same_bits.dtype) is BF16
