"""Loss and gradients in one pass: against float64, and without a product too many."""

from __future__ import annotations

import pytest
import torch

from elmo_compile.kernels import aten, reference
from elmo_compile.kernels.aten.row_blocks import MOST_ROUNDINGS, fits_row_blocks
from elmo_compile.numerics.update import Update
from elmo_compile.testing.budget import assert_within_budget
from elmo_compile.testing.memory import peak_bytes

from .head_cases import exact, in_torch, problem, replaced
from .test_aten_budget import DTYPES, KINDS

SEEDS = 12


def results(kind: str, dtypes: str, rows: int, seed: int, **changes) -> dict[str, tuple]:
    """(actual, exact, torch's) of each result."""
    weight, compute = DTYPES[dtypes]
    p = problem(kind, weight=weight, compute=compute, seed=seed, **changes)
    scale_N = torch.rand(p.x_ND.shape[0])
    truth, same = exact(p), in_torch(p, scale_N)
    made = reference.loss_and_gradients(truth, scale_N.double(), 0)
    got = aten.loss_and_gradients(p, scale_N, rows)
    assert got.rows_N is not None
    found = {
        "rows": (got.rows_N, made.rows_N, same.rows_N),
        "dx": (got.dx_ND, made.dx_ND, same.dx_ND),
        "dw": (got.dw_LD, made.dw_LD, same.dw_LD),
    }
    if p.b_L is not None:
        found["db"] = (got.db_L, made.db_L, same.db_L)
    return {name: tuple(t.detach() for t in three) for name, three in found.items()}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 3, 4, 100])
def test_budget(kind: str, dtypes: str, rows: int) -> None:
    for bias in (False, True):
        made = [results(kind, dtypes, rows, seed, bias=bias) for seed in range(SEEDS)]
        for what in made[0]:
            three = [torch.cat(parts) for parts in zip(*(r[what] for r in made))]
            assert_within_budget(*three, what=what)


@pytest.mark.parametrize("dtypes", ["float32", "bf16", "fp8"])
def test_budget_compiled(dtypes: str) -> None:
    """Large enough for Inductor's pieces; a ragged last chunk and a ragged, odd last block."""
    sizes = {"num_rows": 301, "num_features": 64, "num_outputs": 20_011, "chunk": 4096}
    for what, three in results("ce", dtypes, 96, 0, **sizes).items():
        assert_within_budget(*three, what=what, ulps=2.0)


def test_blocks_do_not_change_more_than_the_order_of_sums() -> None:
    p = problem("ce", num_rows=50, num_outputs=300)
    scale_N = torch.rand(50)
    whole = aten.loss_and_gradients(p, scale_N, 50)
    for rows in (1, 7, 16, 49):
        parts = aten.loss_and_gradients(p, scale_N, rows)
        for one, other in zip(whole[:4], parts[:4]):
            torch.testing.assert_close(one, other)


def test_what_is_not_needed_is_not_made() -> None:
    p = problem("ce", num_rows=20)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        flags = dict(zip(("need_dx", "need_dw", "need_db"), needs))
        made = aten.loss_and_gradients(p, torch.ones(20), 8, **flags)
        assert [t is not None for t in made[:3]] == list(needs)
        assert made.rows_N is not None


def test_a_batch_of_no_rows() -> None:
    p = problem("ce", num_rows=1)
    p = type(p)(**{**vars(p), "x_ND": p.x_ND[:0], "target": p.target[:0]})
    made = aten.loss_and_gradients(p, torch.ones(0), 8)
    assert made.dx_ND.shape == (0, 12)
    assert not made.dw_LD.any()
    assert not made.db_L.any()


def test_bf16_gradients_are_not_rounded_many_times() -> None:
    p = problem("ce", num_rows=100, weight=torch.bfloat16, compute=torch.bfloat16)
    fewest = -(-100 // MOST_ROUNDINGS)
    assert fits_row_blocks(p, fewest, True)
    assert not fits_row_blocks(p, fewest - 1, True)
    assert fits_row_blocks(p, 1, False)
    made = aten.loss_and_gradients(p, torch.ones(100), 1)
    again = aten.backward(p, aten.forward(p).stats_2N, torch.ones(100))
    assert torch.equal(made.dw_LD, again.dw_LD)


@pytest.mark.parametrize(("kind", "rows", "most"), [("ce", 16, 3), ("ce", 0, 4), ("bce", 0, 3)])
def test_products(kind: str, rows: int, most: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"num_rows": 64, "num_features": 32, "num_outputs": 512}
    dtypes = {"weight": torch.bfloat16, "compute": torch.bfloat16}  # addmm_ is not counted
    p = problem(kind, chunk=128, bias=False, **sizes, **dtypes)
    with FlopCounterMode(display=False) as counter:
        aten.loss_and_gradients(p, torch.ones(64), rows)
    assert counter.get_total_flops() == most * 2 * 64 * 32 * 512


def test_a_block_of_logits_is_all_that_is_held() -> None:
    sizes = {"num_rows": 256, "num_features": 32, "num_outputs": 20_000}
    p = problem("ce", chunk=512, bias=False, **sizes)
    peak = peak_bytes(aten.loss_and_gradients, p, torch.ones(256), 32, need_dw=False)
    assert 32 * 20_000 * 4 <= peak < 1.4 * 32 * 20_000 * 4


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", ["ce", "ce_dense"])
@pytest.mark.parametrize("rows", [7, 1024])
def test_held_logits_give_the_same_bits(kind: str, dtypes: str, rows: int) -> None:
    """1024 rows of float32 lie a multiple of 4 KiB apart: held with a gap between them."""
    weight, compute = DTYPES[dtypes]
    p = problem(kind, num_rows=rows, weight=weight, compute=compute)
    held = aten.new_held(p)
    made, plain = aten.forward(p, held=held), aten.forward(p)
    assert all(torch.equal(one, other) for one, other in zip(made, plain))
    scale_N, kept = torch.rand(rows), held.clone()
    for one, other in zip(
        aten.backward(p, made.stats_2N, scale_N, held=held),
        aten.backward(p, made.stats_2N, scale_N),
    ):
        assert one is other is None or torch.equal(one, other)
    ours, theirs = replaced(p), replaced(p)
    update = Update(lr=0.1)
    aten.backward_update(ours, made.stats_2N, scale_N, update, held=kept)
    aten.backward_update(theirs, made.stats_2N, scale_N, update)
    assert torch.equal(ours.w_LD.view(torch.uint8), theirs.w_LD.view(torch.uint8))


def test_the_largest_logits_of_each_row_are_collected() -> None:
    for kind, rows in (("ce", 16), ("ce", 0), ("bce", 0)):
        p = problem(kind, num_rows=50, num_outputs=300, bias=False)
        top = aten.TopRows(50, 3, None)
        aten.loss_and_gradients(p, torch.ones(50), rows, top=top)
        want = (p.x_ND @ p.w_LD.t()).topk(3)
        values, indices = top.result()
        torch.testing.assert_close(values, want.values)
        assert torch.equal(indices, want.indices)
