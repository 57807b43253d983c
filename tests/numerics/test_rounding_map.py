"""The rounding map, by enumeration: no statistics, every random word of every cell.

A cell is the interval between two neighbours of a format. For a value at a fraction of its cell
the number of words that round up must be exactly `round(fraction * 2^n)`.
"""

import itertools
import math

import pytest
import torch

from elmo_compile.numerics.formats import BF16, E4M3, E5M2, FORMATS
from elmo_compile.numerics.rounding import (
    fp8_codes_nearest,
    fp8_codes_stochastic,
    nearest_on_grid,
    round_nearest,
    round_stochastic_bits,
)

FP8 = (E4M3, E5M2)


def by_name(fmt):
    return fmt.name


def fp8_grid(fmt):
    """Every finite value that is not negative, ascending, in float64."""
    values = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).double()
    return values[values.isfinite()]


def all_cells(fmt):
    """(lo, hi) as floats: every cell of fp8; every exponent and eight mantissas of bf16."""
    if fmt is not BF16:
        grid = fp8_grid(fmt).tolist()
        return list(itertools.pairwise(grid))
    mantissas = (0, 1, 2, 31, 64, 85, 126, 127)
    codes = torch.tensor([e << 7 | m for e in range(255) for m in mantissas][:-1])
    lo, hi = (((codes + i) << 16).int().view(torch.float32).double() for i in (0, 1))
    return list(zip(lo.tolist(), hi.tolist()))


def count_up(round_map, v, lo, hi, fmt, words):
    """How many words round v to the cell's upper end; all others must give the lower end."""
    sign = math.copysign(1.0, v)
    ends = torch.tensor([v, sign * lo, sign * hi], dtype=torch.float32)
    down = up = 0
    for some in words.split(2**17):  # stays in the cache
        got = round_map(ends[:1], some, fmt).view(torch.int32)
        down += torch.count_nonzero(got == ends.view(torch.int32)[1]).item()
        up += torch.count_nonzero(got == ends.view(torch.int32)[2]).item()
    return up if up + down == words.numel() else None


def every_word(fmt):
    return torch.arange(2**fmt.random_bits, dtype=torch.int32)


def fractions(cell, n, sign):
    """Numerators over 2^n: one that differs by cell, with the middle or with both ends' neighbours.

    The ends themselves are fixed points, tested below.
    """
    own = (cell * 2654435761 + 12345 + sign) % 2**n
    return (1, own, 2**n - 1) if sign > 0 else (2 ** (n - 1), own)


@pytest.fixture(autouse=True)
def _one_thread():
    """Many operations of a few milliseconds: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_every_cell_rounds_up_for_exactly_its_share_of_words(fmt, sign):
    words, n = every_word(fmt), fmt.random_bits
    cells = all_cells(fmt)
    for i, (lo, hi) in enumerate(cells):
        for k in fractions(i, n, sign):
            v = sign * (lo + (hi - lo) * (k / 2**n))
            assert count_up(round_stochastic_bits, v, lo, hi, fmt, words) == k, (v, lo, hi)
    assert len(cells) == {"bf16": 255 * 8 - 1, "e4m3": 126, "e5m2": 123}[fmt.name]


@pytest.mark.parametrize("fmt", FP8, ids=by_name)
def test_below_the_shift_a_value_is_first_rounded_to_a_random_bit(fmt):
    """float32 is finer than 2^-n of a step there: the count is that of the nearest fraction."""
    words, n, step = every_word(fmt), fmt.random_bits, fmt.min_step
    random = torch.rand(12, generator=torch.Generator().manual_seed(5)) * fmt.min_normal
    unit = step * 2.0**-n
    exact = [unit / 2, unit * 1.5, unit * 0.75, fmt.min_normal * (1 - 2.0**-24), *random.tolist()]
    for v in exact:
        lo = math.floor(v / step) * step
        expected = round((v - lo) / step * 2**n)  # half to even, as float32's addition
        assert count_up(round_stochastic_bits, v, lo, lo + step, fmt, words) == expected
        assert abs(expected / 2**n - (v - lo) / step) <= 2.0 ** (-n - 1)


def test_smallest_values_of_the_specification():
    words = every_word(E4M3)
    assert count_up(round_stochastic_bits, 2.0**-30, 0.0, 2.0**-9, E4M3, words) == 0
    assert count_up(round_stochastic_bits, 2.0**-29, 0.0, 2.0**-9, E4M3, words) == 1


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_only_the_low_bits_of_a_word_are_used(fmt):
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(4096, generator=generator) * fmt.min_normal * 3
    r = torch.randint(-(2**31), 2**31, (4096,), generator=generator).int()
    a, b = (round_stochastic_bits(v, w, fmt) for w in (r, r & fmt.random_mask))
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))


# What a published implementation does: no shift, and the cast decides the rest.


def naive_round(v, r, fmt):
    """Random bits into the float32 mantissa, cleared, then a cast that rounds to nearest."""
    bits = (v.view(torch.int32) + (r & fmt.random_mask)) & ~fmt.random_mask
    return bits.view(torch.float32).to(fmt.dtype).float()


@pytest.mark.parametrize("fmt", FP8, ids=by_name)
def test_codes_are_the_bytes_of_what_is_rounded(fmt):
    """In, between (ties too) and beyond all cells; words that round down, up, in the middle."""
    grid = fp8_grid(fmt)
    between = (grid[:-1, None] + (grid[1:] - grid[:-1])[:, None] * torch.linspace(0, 1, 33)).view(
        -1
    )
    beyond = [fmt.max * f for f in (1.01, 1.5, 3.0)] + [1e30, 3.4e38, math.inf, 1e-45, 1e-12]
    v = torch.cat((between, torch.tensor(beyond))).float()
    v = torch.cat((v, -v, torch.tensor([math.nan, -math.nan])))[:, None]
    n = fmt.random_bits
    words = torch.tensor([0, 1, 2**n - 1, 2 ** (n - 1), 2 ** (n - 1) - 1, -1, 12345, -98765])
    r = torch.cat((words, torch.arange(0, 2**n, 2**n // 16))).to(torch.int32)
    expected = round_stochastic_bits(v, r, fmt).to(fmt.dtype).view(torch.uint8)
    assert torch.equal(fp8_codes_stochastic(v, r, fmt), expected.to(torch.int32))
    nearest = round_nearest(v, fmt.dtype).view(torch.uint8)
    assert torch.equal(fp8_codes_nearest(v, fmt), nearest.to(torch.int32))


@pytest.mark.parametrize("fmt", FP8, ids=by_name)
def test_naive_rounding_fails_in_every_cell_below_the_normals_and_nowhere_else(fmt):
    words, n = every_word(fmt), fmt.random_bits
    cells = [c for i, c in enumerate(all_cells(fmt)) if c[0] < 2 * fmt.min_normal or i % 4 == 3]
    failing = set()
    for i, (lo, hi) in enumerate(cells):
        for k in fractions(i, n, -1):
            if count_up(naive_round, lo + (hi - lo) * (k / 2**n), lo, hi, fmt, words) != k:
                failing.add(lo)
    assert failing == {lo for lo, _ in cells if lo < fmt.min_normal}
    assert len(failing) == 2**fmt.mantissa_bits


@pytest.mark.parametrize("fmt", FP8, ids=by_name)
def test_naive_rounding_loses_half_a_step_and_doubles_one_and_a_half(fmt):
    words, step = every_word(fmt), fmt.min_step

    def mean(round_map, steps):
        v = torch.tensor([steps * step])
        return round_map(v, words, fmt).double().mean().item() / step

    assert [mean(naive_round, s) for s in (0.5, 1.5)] == [0.0, 2.0]
    assert [mean(round_stochastic_bits, s) for s in (0.5, 1.5)] == [0.5, 1.5]


def test_share_of_small_weights_that_live_where_naive_rounding_is_wrong():
    w = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    assert (w.abs() < E4M3.min_normal).double().mean().item() == pytest.approx(0.57, abs=0.01)


# Values with no cell, or at the end of one.

INF, NAN = math.inf, math.nan


def extremes(fmt):
    """Some words including all zeros and all ones."""
    some = torch.randint(0, 2**31, (62,), generator=torch.Generator().manual_seed(2))
    return torch.cat([torch.tensor([0, -1]), some]).int()


def rounded(v, fmt):
    """The bits of v rounded with many words, as a set."""
    got = round_stochastic_bits(torch.tensor([v], dtype=torch.float32), extremes(fmt), fmt)
    assert torch.equal(got.to(fmt.dtype).float().isnan(), got.isnan())
    assert torch.equal(got[~got.isnan()].to(fmt.dtype).float(), got[~got.isnan()])
    return set(got.view(torch.int32).tolist())


def pattern(v):
    return torch.tensor([v], dtype=torch.float32).view(torch.int32).item()


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_special_values(fmt):
    top = INF if fmt.keeps_inf else fmt.max
    assert rounded(INF, fmt) == {pattern(top)}
    assert rounded(-INF, fmt) == {pattern(-top)}
    assert rounded(0.0, fmt) == {pattern(0.0)}
    assert rounded(-0.0, fmt) == {pattern(-0.0)}
    for v in (fmt.max, 3.4028234663852886e38, fmt.max * (1 + 2.0**-8)):
        if math.isfinite(torch.tensor(v).item()):
            assert rounded(v, fmt) == {pattern(fmt.max)}
            assert rounded(-v, fmt) == {pattern(-fmt.max)}


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_every_nan_becomes_the_canonical_one(fmt):
    payloads = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -(2**22)]).int()
    for word in extremes(fmt).tolist():
        r = torch.full((5,), word, dtype=torch.int32)
        got = round_stochastic_bits(payloads.view(torch.float32), r, fmt)
        assert got.view(torch.int32).unique().tolist() == [0x7FC00000]
        stored = got.to(fmt.dtype)
        assert stored.float().isnan().all()
        assert stored.view(torch.uint8 if fmt in FP8 else torch.int16).unique().numel() == 1


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_underflow_keeps_its_sign(fmt):
    tiny = 2.0**-149 if fmt is BF16 else 2.0**-40
    zero_word = torch.zeros(1, dtype=torch.int32)
    got = round_stochastic_bits(torch.tensor([-tiny]), zero_word, fmt)
    assert got.view(torch.int32).item() == pattern(-0.0)
    assert pattern(-0.0) in rounded(-fmt.min_step / 2, fmt)
    assert pattern(-fmt.min_step) in rounded(-fmt.min_step / 2, fmt)


@pytest.mark.parametrize("fmt", FP8, ids=by_name)
def test_every_stored_value_is_a_fixed_point_and_its_cast_exact(fmt):
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = codes.view(fmt.dtype).float()
    finite = values.isfinite()
    r = extremes(fmt)[:, None]
    got = round_stochastic_bits(values[finite], r, fmt)
    assert torch.equal(got.to(fmt.dtype).view(torch.uint8), codes[finite].expand(got.shape))


def test_every_bf16_value_is_a_fixed_point():
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    values = values[~values.isnan()]
    got = round_stochastic_bits(values, torch.tensor([[0], [-1]], dtype=torch.int32), BF16)
    assert torch.equal(got.view(torch.int32), values.view(torch.int32).expand(got.shape))


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_nearest_on_grid_is_round_nearest(fmt):
    """Random bit patterns, subnormals, every tie and its neighbours, what saturates, NaN."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,)).to(torch.int32)
    ties = torch.arange(-512, 512).float() * fmt.min_step / 2
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 2 * fmt.max, 1.01 * fmt.max])
    near = torch.cat([ties, ties * (1 + 2.0**-23), ties * (1 - 2.0**-23)])
    v = torch.cat([bits.view(torch.float32), near, special, torch.randn(4096) * fmt.min_normal])
    got, wanted = nearest_on_grid(v, fmt), round_nearest(v, fmt.dtype).float()
    assert torch.equal(got.isnan(), wanted.isnan())
    real = ~got.isnan()
    assert torch.equal(got[real].view(torch.int32), wanted[real].view(torch.int32))


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_what_rounding_loses_is_not_optimised_away(fmt):
    """A compiler that leaves out a cast to bf16 and back makes every rounding error 0."""
    v = torch.rand(1 << 10) * 4 * fmt.min_normal

    def lost(v):
        return v - nearest_on_grid(v, fmt)

    torch._dynamo.reset()
    found = torch.compile(lost)(v)
    assert found.any()
    assert torch.equal(found, lost(v))
