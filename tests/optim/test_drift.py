"""Small updates must add up: to nearest they vanish, stochastically and with Kahan they do not.

Each weight takes the same gradient 4096 times, an update of a hundredth of its format's step.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.numerics.formats import BF16, E4M3, E5M2, StorageFormat, format_of
from elmo_compile.numerics.rounding import round_nearest
from elmo_compile.numerics.update import (
    Form,
    Rates,
    Update,
    advance,
    debiased,
    eco_factor,
    half_step_at_largest,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from paper_rounding import PaperSGD

STEPS, SHARE, ELEMENTS = 4096, 0.01, 4096
STARTS = {
    "bf16": (torch.bfloat16, 1.0, 2.0**-7),
    "e4m3": (torch.float8_e4m3fn, 1.0, 2.0**-3),
    "e4m3 subnormal": (torch.float8_e4m3fn, 3 * 2.0**-9, 2.0**-9),
}
"""Storage, where the weight starts, the distance to its upper neighbour there."""


def drifted(start: str, make: Any) -> tuple[Tensor, float]:
    """(how far each element went, in steps of where it began; how far in exact arithmetic)."""
    dtype, value, step = STARTS[start]
    p = nn.Parameter(torch.full((64, ELEMENTS // 64), value).to(dtype))
    p.grad_dtype = None
    opt = make([p])
    p.grad = torch.full(p.shape, -SHARE * step)
    for _ in range(STEPS):
        opt.step()
    return (p.detach().float() - value) / step, STEPS * SHARE


def sgd(rounding: str, **more: Any) -> Any:
    return lambda params: elmo.optim.SGD(params, 1.0, rounding=rounding, fused=False, **more)


@pytest.mark.parametrize("start", STARTS)
def test_rounding_to_nearest_loses_every_update(start: str) -> None:
    moved, _ = drifted(start, sgd("nearest"))
    assert not moved.any()


@pytest.mark.parametrize("start", STARTS)
def test_stochastic_rounding_keeps_them_in_expectation(start: str) -> None:
    moved, exact = drifted(start, sgd("stochastic"))
    # Variance: a step of size s is taken with probability p = update / s, s at most 4 of the
    # first (the weight moves up by less than four binades' worth of its first step).
    sigma = math.sqrt(4 * exact / ELEMENTS)
    assert abs(float(moved.mean()) - exact) < 5 * sigma
    assert float(moved.std()) > 1


@pytest.mark.parametrize(
    ("start", "compensation"),
    [
        ("bf16", torch.bfloat16),
        ("bf16", torch.float8_e5m2),
        ("e4m3", torch.bfloat16),
        ("e4m3", torch.float8_e5m2),
        ("e4m3 subnormal", torch.bfloat16),
        ("e4m3 subnormal", torch.float8_e5m2),
    ],
)
def test_kahan_keeps_them(start: str, compensation: torch.dtype) -> None:
    """Each element ends within a step of where it should; what is left is in the compensation."""
    moved, exact = drifted(start, sgd("kahan", compensation_dtype=compensation))
    # The rounding of the compensation itself is a random walk, small beside a step for bf16.
    assert abs(float(moved.mean()) - exact) < 1.5
    if compensation == torch.bfloat16:
        assert float((moved - exact).abs().max()) <= 8  # a step of where it ends, in first steps


def test_kahan_for_some_rows_and_stochastic_for_the_rest() -> None:
    moved, exact = drifted("e4m3", sgd("stochastic", kahan_rows=[0, 5]))
    rows = moved[[0, 5]]
    assert float(rows.std()) < 1.5 < float(moved[1].std())
    assert abs(float(moved.mean()) - exact) < 5 * math.sqrt(4 * exact / ELEMENTS)


def test_the_published_rounding_loses_them_below_the_normal_range() -> None:
    """The counter-example: unbiased on E4M3's normal numbers, stuck on its subnormals."""
    moved, exact = drifted("e4m3", lambda params: PaperSGD(params, 1.0, seed=0))
    assert abs(float(moved.mean()) - exact) < 5 * math.sqrt(4 * exact / ELEMENTS)
    moved, _ = drifted("e4m3 subnormal", lambda params: PaperSGD(params, 1.0, seed=0))
    assert not moved.any()
    moved, exact = drifted("e4m3 subnormal", sgd("stochastic"))
    assert abs(float(moved.mean()) - exact) < 5 * math.sqrt(4 * exact / ELEMENTS)


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_eco_follows_the_master_weights(rule: str) -> None:
    """On a quadratic, weights rounded to nearest stop early; the momentum takes them on."""
    torch.manual_seed(0)
    target = torch.randn(64, 64) * 0.1

    def distance(dtype: torch.dtype, **more: Any) -> float:
        p = nn.Parameter(torch.ones(64, 64).to(dtype))
        p.grad_dtype = None
        common = {"fused": False, "state_dtype": torch.float32, "rounding": "nearest", **more}
        if rule == "momentum":
            opt: Any = elmo.optim.SGD([p], 1e-3, momentum=0.9, **common)
        else:
            opt = elmo.optim.AdamW([p], 1e-3, weight_decay=0.0, **common)
        for _ in range(800):
            p.grad = p.detach().float() - target
            opt.step()
        return float((p.detach().float() - target).square().mean().sqrt())

    master = distance(torch.float32)
    assert abs(distance(torch.bfloat16, eco=True) - master) < 0.25 * abs(
        distance(torch.bfloat16) - master
    )


FINITE = {"allow_nan": False, "allow_infinity": False, "width": 32}


@settings(max_examples=300, deadline=None)
@given(
    w=st.floats(-1.0, 1.0, **FINITE),
    updates=st.lists(st.floats(-0.0625, 0.0625, **FINITE), min_size=1, max_size=30),
    fmt=st.sampled_from([BF16, E4M3, E5M2]),
)
def test_weight_and_compensation_are_the_exact_sum(
    w: float, updates: list[float], fmt: StorageFormat
) -> None:
    """With a float32 compensation, `w + c` follows a float64 sum, and c is at most half a step."""
    stored = round_nearest(torch.tensor([w]), fmt.dtype).float()
    c, exact = torch.zeros(1), stored.double()
    for u in updates:
        grad = torch.tensor([-u])
        stored, _, made = advance(
            Form("sgd"), stored, grad, (), c, Rates(lr=1.0),
            lambda v: round_nearest(v, fmt.dtype).float(), fmt,
        )  # fmt: skip
        assert made is not None
        c, exact = made, exact + grad.double().neg()
        step = 2.0 ** max(math.frexp(float(stored))[1] - 1, math.frexp(fmt.min_normal)[1] - 1)
        assert abs(float(c)) <= step * 2.0**-fmt.mantissa_bits / 2 + 1e-9
    assert abs(float(stored.double() + c.double() - exact)) <= 1e-6


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, **FINITE), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16]),
)
def test_a_saturated_weight_does_not_pile_up_compensation(
    values: list[float], dtype: torch.dtype
) -> None:
    fmt = format_of(dtype)
    w, c = torch.tensor([fmt.max]), torch.zeros(1)
    for value in values:
        w, _, made = advance(
            Form("sgd"), w, torch.tensor([-abs(value)]), (), c, Rates(lr=1.0),
            lambda v: round_nearest(v, dtype).float(), fmt,
        )  # fmt: skip
        assert made is not None
        c = made
    assert float(w) == fmt.max
    assert abs(float(c)) <= half_step_at_largest(fmt)


@settings(max_examples=200, deadline=None)
@given(
    beta=st.floats(0.0, 0.9999),
    gradients=st.lists(st.floats(-10, 10, **FINITE), min_size=1, max_size=40),
)
def test_debiased_betas_give_the_bias_corrected_average(
    beta: float, gradients: list[float]
) -> None:
    plain = corrected = 0.0
    for step, g in enumerate(gradients):
        plain = beta * plain + (1 - beta) * g
        b = debiased(beta, step)
        corrected = b * corrected + (1 - b) * g
        assert corrected == pytest.approx(plain / (1 - beta ** (step + 1)), rel=1e-6, abs=1e-9)


def test_eco_at_a_rate_of_zero_changes_nothing() -> None:
    assert eco_factor(0.0, 0.9) == 0.0
    p = nn.Parameter(torch.randn(8, 8).bfloat16())
    before = p.detach().clone()
    opt = elmo.optim.SGD([p], 0.0, momentum=0.9, eco=True, fused=False)
    p.grad = torch.randn(8, 8).bfloat16()
    opt.step()
    assert torch.equal(p, before)
    assert torch.isfinite(opt.state[p]["momentum_buffer"]).all()


def test_update_knows_its_rates() -> None:
    update = Update(lr=0.5, beta1=0.25, weight_decay=0.1)
    assert update.rates == Rates(0.5, 0.1, 0.25)
    assert update.form == Form("sgd", False, False)
