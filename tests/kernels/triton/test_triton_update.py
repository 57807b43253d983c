"""The fused update: bit for bit the specification's, whatever the chunk; and what forbids it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from elmo_compile.kernels import triton as family
from elmo_compile.numerics.update import Update
from kernels.triton.cases import (
    PRECISIONS,
    bits,
    exact_update_problem,
    make,
    moved,
    scale_of,
    updated_by_reference,
)

PLAIN = Update(lr=205 / 2**14, seed=3, param_id=2**32 - 1, step=5)
"""A rate of few bits, so that its products are exact, and off the grids of bf16 and fp8."""


def momentum_update(dtype: torch.dtype, **options: object) -> Callable[[], Update]:
    """A maker of updates with a buffer of their own, shaped for `exact_update_problem`."""

    def build() -> Update:
        buffer = torch.arange(101 * 37, dtype=torch.float32).remainder_(13).sub_(6).view(101, 37)
        return dataclasses.replace(PLAIN, momentum=0.5, buffer=buffer.to(dtype), **options)

    return build


UPDATES: dict[str, Callable[[], Update]] = {
    "plain": lambda: PLAIN,
    "nearest": lambda: dataclasses.replace(PLAIN, rounding="nearest"),
    "decay": lambda: dataclasses.replace(PLAIN, weight_decay=0.125, step=2**40 + 1),
    "momentum": momentum_update(torch.float32),
    "nesterov, bf16 buffer": momentum_update(torch.bfloat16, nesterov=True),
    "a shard far down": lambda: dataclasses.replace(PLAIN, row_offset=2**32 - 40),
}
QUICK = {"fp8": set(UPDATES), "bf16": {"plain", "nesterov, bf16 buffer"}, "fp32": {"momentum"}}


def run(precision: str, update: Update, chunk: int, device: str) -> tuple[torch.Tensor, ...]:
    """Bits of (weight, momentum) after one update of the exact problem."""
    p = exact_update_problem(precision, chunk)
    buffer = None if update.buffer is None else update.buffer.clone().to(device)
    scale_N = torch.full((p.x_ND.shape[0],), 0.5, device=device)
    q = moved(p, device)
    update = dataclasses.replace(update, buffer=buffer)
    family.backward_update(q, torch.empty(0, device=device), scale_N, update)
    return tuple(bits(t) for t in (q.w_LD, buffer) if t is not None)


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        pytest.param(p, u, marks=() if u in QUICK.get(p, ()) else pytest.mark.slow)
        for p in PRECISIONS
        for u in UPDATES
    ],
)
def test_update_is_the_specification_s_bit_for_bit(precision: str, name: str, device: str) -> None:
    p = exact_update_problem(precision, 40)
    update = UPDATES[name]()
    expected = updated_by_reference(p, torch.full((6,), 0.5), update)
    got = run(precision, update, 40, device)
    assert not torch.equal(got[0], bits(p.w_LD))
    for actual, wanted in zip(got, expected):
        assert torch.equal(actual, bits(wanted))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_same_bits_for_every_chunk(precision: str, device: str) -> None:
    whole = run(precision, PLAIN, 101, device)
    for chunk in (32, 13):
        for a, b in zip(whole, run(precision, PLAIN, chunk, device)):
            assert torch.equal(a, b)


def test_new_bits_for_every_step_seed_and_parameter(device: str) -> None:
    first = run("fp8", PLAIN, 101, device)[0]
    assert torch.equal(first, run("fp8", PLAIN, 101, device)[0])
    for change in ({"step": 6}, {"seed": 4}, {"param_id": 0}, {"row_offset": 1}):
        other = run("fp8", dataclasses.replace(PLAIN, **change), 101, device)[0]
        assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_update_is_the_unfused_one(kind: str, device: str) -> None:
    """From dw of the same kernels: the same weights, up to the order of float32 operations."""
    p = moved(make(kind, "fp32", num_rows=9, num_features=21, num_outputs=70, chunk=40), device)
    scale = scale_of(p).to(device)
    stats = family.forward(p).stats_2N
    expected = p.w_LD - 0.1 * (family.backward(p, stats, scale).dw_LD + 0.01 * p.w_LD)
    family.backward_update(p, stats, scale, Update(lr=0.1, weight_decay=0.01))
    torch.testing.assert_close(p.w_LD, expected, rtol=1e-6, atol=1e-7)


def test_dx_is_of_the_weight_as_it_was(device: str) -> None:
    """Several chunks, and a step long enough that the new weight would show."""
    p = moved(make("bce", "fp32", num_rows=5, num_outputs=70, chunk=33), device)
    scale, empty = torch.ones(5, device=device), p.x_ND.new_empty(0)
    before = family.backward(p, empty, scale, need_dw=False)
    got = family.backward_update(p, empty, scale, Update(lr=10.0))
    assert torch.equal(got.dx_ND, before.dx_ND)
    assert torch.equal(got.db_L, before.db_L)
    assert before.dw_LD is None
    assert got.rows_N is None


@pytest.mark.parametrize("raised", [0, 1, -7])
def test_guard_forbids_every_write(raised: int, device: str) -> None:
    p = moved(exact_update_problem("fp8", 40), device)
    update = momentum_update(torch.bfloat16)()
    update = dataclasses.replace(update, buffer=update.buffer.to(device))
    before = p.w_LD.view(torch.uint8).clone(), update.buffer.clone()
    guard = torch.tensor([raised], dtype=torch.int32, device=device)
    empty, scale = p.x_ND.new_empty(0), torch.ones(6, device=device)
    family.backward_update(p, empty, scale, update, guard=guard)
    kept = torch.equal(p.w_LD.view(torch.uint8), before[0]), torch.equal(update.buffer, before[1])
    assert kept == ((False, False) if raised == 0 else (True, True))


def test_nan_gradient_is_stored_as_the_canonical_nan(device: str) -> None:
    p = moved(exact_update_problem("fp8", 101), device)
    scale = torch.full((6,), float("nan"), device=device)
    family.backward_update(p, p.x_ND.new_empty(0), scale, PLAIN)
    assert (p.w_LD.view(torch.uint8) == 0x7F).all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_three_million_labels(precision: str, device: str) -> None:
    """2 812 281 x 768 > 2^31: the last rows are reached, and rounded as the specification says."""
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    labels, features, rows, last = 2_812_281, 768, 16, 1000
    weight = PRECISIONS[precision][0]
    w = torch.zeros(labels, features, dtype=torch.bfloat16, device=device).to(weight)
    p = make("bce_dense", precision, num_rows=rows, num_features=features, num_outputs=last)
    p = dataclasses.replace(p, x_ND=p.x_ND.sign(), w_LD=w[:last].cpu(), b_L=None)
    p = dataclasses.replace(p, target=torch.zeros(rows, last))
    scale = torch.full((rows,), 0.5)
    expected, _ = updated_by_reference(
        p, scale, dataclasses.replace(PLAIN, row_offset=labels - last)
    )
    for chunk in (65536, labels):
        big = torch.zeros(labels, features, dtype=torch.bfloat16, device=device).to(weight)
        zeros = torch.zeros(1, 1, device=device).expand(rows, labels)
        q = dataclasses.replace(moved(p, device), w_LD=big, target=zeros, chunk=chunk)
        family.backward_update(q, torch.empty(0, device=device), scale.to(device), PLAIN)
        assert torch.equal(bits(big[-last:]), bits(expected))
