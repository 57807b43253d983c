"""The fused update: bit for bit the specification's, whatever the chunk; and what forbids it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from elmo_compile.kernels import reference as family_reference
from elmo_compile.kernels import triton as family
from elmo_compile.kernels.triton import weight_update
from elmo_compile.kernels.triton.configs import CHIPS, assume_chip, override_tiles
from elmo_compile.kernels.triton.storage import INTERPRETED
from elmo_compile.numerics.update import Update
from kernels.triton.cases import (
    PRECISIONS,
    bits,
    check_step,
    exact_update_problem,
    make,
    moved,
    scale_of,
    updated_by_reference,
)
from kernels.updates import UPDATES, tensors, with_copies

PLAIN = Update(lr=205 / 2**14, seed=3, param_id=2**32 - 1, step=5)
"""A rate of few bits, so that its products are exact, and off the grids of bf16 and fp8."""


IN_THE_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
QUICK = {"fp8": set(UPDATES), "bf16": {"sgd", "nesterov, bf16", "kahan, adamw"}, "fp32": {"adamw"}}
"""Of these every combination is run by default: bits of fp8 are the hardest."""


def made(name: str) -> Update:
    """An update for the weight of `exact_update_problem`."""
    return dataclasses.replace(UPDATES[name](101, 37), seed=3, param_id=2**32 - 1)


def run(precision: str, update: Update, chunk: int, device: str) -> dict[str, torch.Tensor]:
    """The weight and the state after one update of the exact problem."""
    p = exact_update_problem(precision, chunk)
    scale_N = torch.full((p.x_ND.shape[0],), 0.5, device=device)
    q, update = moved(p, device), with_copies(update, device)
    family.backward_update(q, torch.empty(0, device=device), scale_N, update)
    return {"weight": q.w_LD, **tensors(update)}


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        pytest.param(p, u, marks=() if u in QUICK.get(p, ()) else pytest.mark.slow)
        for p in PRECISIONS
        for u in UPDATES
    ],
)
def test_update_is_the_specification_s_bit_for_bit(precision: str, name: str, device: str) -> None:
    """Every bit where no root is taken (torch's on a CPU is not correctly rounded), and no product
    is contracted with a sum, as a GPU does; else all but few, those by a grid step."""
    p = exact_update_problem(precision, 40)
    update = made(name)
    expected = updated_by_reference(p, torch.full((6,), 0.5), update)
    got = run(precision, update, 40, device)
    assert not torch.equal(bits(got["weight"]), bits(p.w_LD))
    rooted = update.rule in ("adamw", "adagrad")
    exact = not rooted and (device == "cpu" or update.compensation is None)
    for key, wanted in expected.items():
        if exact:
            assert torch.equal(bits(got[key]), bits(wanted)), key
        elif wanted.dtype == torch.float32:
            torch.testing.assert_close(got[key].cpu(), wanted)
        else:
            differ = bits(got[key]) != bits(wanted)
            assert float(differ.float().mean()) <= 2e-3, key


@pytest.mark.parametrize("name", ["sgd", "nesterov, bf16", "kahan, adamw", "adagrad"])
def test_a_pass_without_dx_in_it_gives_the_same_bits(name: str, device: str) -> None:
    """As batches larger than a tile have it, and chips whose table says so."""
    shared = run("fp8", made(name), 40, device)
    with override_tiles(shared=None, shared_with_state=None):
        apart = run("fp8", made(name), 40, device)
    for key, value in shared.items():
        assert torch.equal(bits(apart[key]), bits(value)), key


@IN_THE_INTERPRETER
@pytest.mark.parametrize("chip", CHIPS)
def test_the_tiles_of_a_chip(chip: int) -> None:
    """The interpreter has small tiles of its own; these are the ones that chips will run."""
    with assume_chip(chip, processors=8):
        options = {"num_rows": 100, "num_features": 200, "num_outputs": 300, "chunk": 170}
        check_step(make("bce", "fp8", **options), "cpu")
        for name in ("sgd", "kahan, adamw"):
            expected = updated_by_reference(
                exact_update_problem("fp8", 40), torch.full((6,), 0.5), made(name)
            )
            got = run("fp8", made(name), 40, "cpu")
            assert torch.equal(bits(got["weight"]), bits(expected["weight"]))


@IN_THE_INTERPRETER
def test_the_shared_pass_is_taken_where_a_tile_holds_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []
    monkeypatch.setattr(
        weight_update,
        "features_update_kernel",
        Recorder(weight_update.features_update_kernel, taken),
    )
    for rows in (6, 32, 33):
        p = make("bce", "fp8", num_rows=rows, num_outputs=70, chunk=40)
        family.backward_update(p, torch.empty(0), torch.ones(rows), PLAIN)
    assert len(taken) == 4  # two chunks each of the first two
    p = make("bce", "fp8", num_rows=6, num_outputs=70, chunk=40)
    family.backward_update(p, torch.empty(0), torch.ones(6), PLAIN, need_dx=False)
    assert len(taken) == 4


class Recorder:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self._launches.append(grid)
        return self._kernel[grid]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_same_bits_for_every_chunk(precision: str, device: str) -> None:
    whole = run(precision, PLAIN, 101, device)
    for chunk in (32, 13):
        other = run(precision, PLAIN, chunk, device)
        assert torch.equal(bits(whole["weight"]), bits(other["weight"]))


def test_new_bits_for_every_step_seed_and_parameter(device: str) -> None:
    first = bits(run("fp8", PLAIN, 101, device)["weight"])
    assert torch.equal(first, bits(run("fp8", PLAIN, 101, device)["weight"]))
    for change in ({"step": 6}, {"seed": 4}, {"param_id": 0}, {"row_offset": 1}):
        other = run("fp8", dataclasses.replace(PLAIN, **change), 101, device)["weight"]
        assert not torch.equal(first, bits(other))


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
    """Several chunks, and a step long enough that the new weight would show.

    With an update, dx's float32 sums are split otherwise.
    """
    p = moved(make("bce", "fp32", num_rows=5, num_outputs=70, chunk=33), device)
    scale, empty = torch.ones(5, device=device), p.x_ND.new_empty(0)
    before = family.backward(p, empty, scale, need_dw=False)
    got = family.backward_update(p, empty, scale, Update(lr=10.0))
    torch.testing.assert_close(got.dx_ND, before.dx_ND, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.db_L, before.db_L)
    assert before.dw_LD is None
    assert got.rows_N is None


@pytest.mark.parametrize("name", ["nesterov, bf16", "kahan rows, adamw, e5m2", "adagrad"])
@pytest.mark.parametrize("raised", [0, 1, -7])
def test_guard_forbids_every_write(raised: int, name: str, device: str) -> None:
    p = moved(exact_update_problem("fp8", 40), device)
    update = with_copies(made(name), device)
    written = {"weight": p.w_LD, **tensors(update)}
    before = {key: bits(t).clone() for key, t in written.items()}
    guard = torch.tensor([raised], dtype=torch.int32, device=device)
    empty, scale = p.x_ND.new_empty(0), torch.ones(6, device=device)
    family.backward_update(p, empty, scale, update, guard=guard)
    for key, t in written.items():
        assert torch.equal(bits(t), before[key]) == (raised != 0), key


@pytest.mark.parametrize("rows", [6, 30])
@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_norm_is_that_of_dw(precision: str, rows: int, device: str) -> None:
    """By the N x N factor of few rows and by x itself; also where the Gram form would cancel."""
    p = make("bce", precision, num_rows=rows, num_features=37, num_outputs=101, chunk=40)
    p = dataclasses.replace(p, x_ND=(1000 + p.x_ND.float()).to(p.x_ND.dtype))
    scale, empty = scale_of(p), torch.empty(0)
    truth = family_reference.backward(p, empty, scale, need_norm=True)
    got = family.backward(
        moved(p, device), empty.to(device), scale.to(device), need_dw=False, need_norm=True
    )
    assert got.dw_LD is None
    torch.testing.assert_close(got.norm2.cpu(), truth.norm2, rtol=2e-3, atol=0)


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
    expected = updated_by_reference(p, scale, dataclasses.replace(PLAIN, row_offset=labels - last))[
        "weight"
    ]
    for chunk in (65536, labels):
        big = torch.zeros(labels, features, dtype=torch.bfloat16, device=device).to(weight)
        zeros = torch.zeros(1, 1, device=device).expand(rows, labels)
        q = dataclasses.replace(moved(p, device), w_LD=big, target=zeros, chunk=chunk)
        family.backward_update(q, torch.empty(0, device=device), scale.to(device), PLAIN)
        assert torch.equal(bits(big[-last:]), bits(expected))
