"""Generator and map together: unbiased in every cell, and small updates are not lost.

Seeds are fixed, so these are not flaky: they show that the bits of version 1 are good ones.
"""

import math

import pytest
import torch

from elmo_compile.numerics.formats import BF16, E4M3, FORMATS
from elmo_compile.numerics.philox import MOMENTUM, WEIGHT
from elmo_compile.numerics.rounding import round_nearest, stochastic_round


def by_name(fmt):
    return fmt.name


def some_cells(fmt):
    """(lo, hi): every eighth cell of fp8 and all the subnormal ones; bf16 across its exponents."""
    if fmt is BF16:
        codes = torch.tensor([0, 1, 126, 127, 128, 16000, 16255, 16256, 16300, 32638])
        lo, hi = (((codes + i) << 16).int().view(torch.float32).double() for i in (0, 1))
        return list(zip(lo.tolist(), hi.tolist()))
    grid = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).double()
    grid = grid[grid.isfinite()].tolist()
    chosen = [i for i in range(len(grid) - 1) if grid[i] < 2 * fmt.min_normal or i % 8 == 1]
    return [(grid[i], grid[i + 1]) for i in [*chosen, len(grid) - 2]]


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_mean_over_a_million_elements_in_each_cell(fmt):
    for i, (lo, hi) in enumerate(some_cells(fmt)):
        fraction = (0.5, 0.1, 0.37, 0.93)[i % 4]
        sign = (-1) ** i
        v = torch.tensor(sign * (lo + fraction * (hi - lo)), dtype=torch.float32)
        got = stochastic_round(v.expand(1024, 1024), fmt.dtype, seed=21, param_id=i)
        up = (got.double() != sign * lo).double().mean().item()
        exact = (abs(v.double().item()) - lo) / (hi - lo)
        assert abs(up - exact) < 2.5e-3, (lo, hi)
        assert abs(up - exact) < 5 * math.sqrt(exact * (1 - exact) / 2**20), (lo, hi)


@pytest.mark.parametrize("fmt", FORMATS, ids=by_name)
def test_small_updates_drift_by_their_sum_and_nearest_loses_them(fmt):
    """4096 updates of 0.01 of a step, end to end; the error is within 5 sigma of the exact sum."""
    steps, lanes = 4096, 256
    step = fmt.min_step if fmt is not BF16 else 2.0**-7  # bf16: a step between 1 and 2
    start = -16 * step if fmt is not BF16 else 1.25
    update = torch.tensor(0.01 * step, dtype=torch.float32)
    w = torch.full((8, lanes // 8), start).to(fmt.dtype)
    variance = torch.zeros(8, lanes // 8, dtype=torch.float64)
    lowest = math.frexp(fmt.min_normal)[1]
    for t in range(steps):
        v = w.float() + update
        exponent = torch.frexp(v)[1].clamp_min(lowest) - 1
        width = torch.ldexp(torch.ones_like(v), exponent - fmt.mantissa_bits)
        variance += (width - update) * update  # of one rounding between neighbours
        w = stochastic_round(v, fmt.dtype, seed=5, step=t)
    drift = w.double().mean().item() - start
    sigma = math.sqrt(variance.sum().item()) / lanes
    assert abs(drift - steps * update.double().item()) < 5 * sigma
    assert sigma < step
    # To nearest the first update changes nothing, so none of 4096 does.
    assert round_nearest(torch.tensor([start]) + update, fmt.dtype).item() == start


def test_weight_and_momentum_errors_are_independent_where_one_word_would_tie_them():
    """One word for two values uniform in their cells correlates their errors at a half."""
    generator = torch.Generator().manual_seed(4)
    w, m = (torch.rand(1024, 1024, generator=generator) * E4M3.min_normal for _ in range(2))

    def error(x, stream):
        return (stochastic_round(x, E4M3.dtype, seed=1, stream=stream).float() - x).flatten()

    def correlation(stream):
        return torch.corrcoef(torch.stack([error(w, WEIGHT), error(m, stream)]))[0, 1].item()

    assert abs(correlation(MOMENTUM)) < 5 / 1024
    assert correlation(WEIGHT) == pytest.approx(0.5, abs=0.01)
