"""Fused updates on a CPU: the bits they write, and that neither chunks nor layouts enter them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from elmo_compile.kernels import aten, reference
from elmo_compile.kernels.aten import chunk_update, head, stored
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.update import Update
from elmo_compile.testing.budget import assert_within_budget

from .head_cases import FP8, exact, problem, replaced
from .updates import UPDATES, tensors, with_copies

WEIGHTS = {
    "float32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp8": (FP8, torch.bfloat16),
}


def updated(family: object, p: HeadProblem, scale_N: Tensor, **options: object) -> Update:
    """Run `backward_update` of a family on p; its weight and the returned buffer are new."""
    update = Update(**options)  # type: ignore[arg-type]
    stats_2N = reference.forward(p).stats_2N
    family.backward_update(p, stats_2N, scale_N, update)  # type: ignore[attr-defined]
    return update


def words(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("features", [12, 10, 7])
def test_integer_data_gives_the_reference_bits(weight: str, name: str, features: int) -> None:
    """All-zero-weight BCE has g = 1/2 or -1/2: gradients are exact, so every bit must agree."""
    dtype, compute = WEIGHTS[weight]
    scale_N = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 4.0, -1.0])
    for chunk in (1, 16, 52, 53, 400):
        p = problem(
            "bce", weight=dtype, compute=compute, chunk=chunk, bias=False, integers=True,
            num_features=features,
        )  # fmt: skip
        p.w_LD.zero_()
        results = []
        for family in (reference, aten):
            q = replaced(p)
            update = with_copies(UPDATES[name](53, features))
            update = dataclasses.replace(update, seed=5, param_id=3)
            family.backward_update(q, torch.empty(0), scale_N, update)
            results.append({"weight": q.w_LD, **tensors(update)})
        for key, wanted in results[0].items():
            if weight == "float32" and key == "weight":
                # Formed in the product's epilogue, whose operations come in another order.
                torch.testing.assert_close(results[1][key], wanted, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(words(results[1][key]), words(wanted)), (key, chunk)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("weight", ["bf16", "fp8"])
def test_a_gradient_that_exists_gives_the_same_bits(weight: str, name: str) -> None:
    """`update_rows` for parameters of any kind, in blocks, against the specification."""
    torch.manual_seed(1)
    w = torch.randn(53, 12).mul(0.3).to(WEIGHTS[weight][0])
    grad = torch.randn(53, 12).to(torch.bfloat16)
    results = []
    for run in (
        lambda w, u: reference.apply_update(w, grad.float(), u),
        lambda w, u: chunk_update.update_rows(w, grad, u),
        lambda w, u: chunk_update.update_rows(w, grad.float(), u),
    ):
        mine, update = w.clone(), with_copies(UPDATES[name](53, 12))
        run(mine, update)
        results.append({"weight": mine, **tensors(update)})
    assert not torch.equal(words(results[0]["weight"]), words(w))
    for other in results[1:]:
        for key, wanted in results[0].items():
            if key == "state 0" and "adagrad" in name:
                torch.testing.assert_close(other[key], wanted)
            else:
                assert torch.equal(words(other[key]), words(wanted)), key


@pytest.mark.parametrize("weight", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_chunks_hardly_enter_on_real_data(kind: str, weight: str) -> None:
    dtype, compute = WEIGHTS[weight]
    scale_N = torch.full((16,), 1 / 16)
    results = []
    for chunk in (17, 64, 1000):
        p = problem(
            kind, num_rows=16, num_features=32, num_outputs=1000, weight=dtype, compute=compute,
            chunk=chunk,
        )  # fmt: skip
        updated(aten, p, scale_N, lr=0.05, seed=1)
        results.append(p.w_LD.float())
    for other in results[1:]:
        differ = other != results[0]
        assert float(differ.float().mean()) <= 1e-4
        ulp = torch.maximum(results[0].abs(), torch.tensor(2.0**-6)) * 2.0**-3
        assert bool(((other - results[0]).abs() <= ulp).all())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("weight", ["float32", "bf16"])
def test_nearest_update_within_budget(weight: str, decay: float) -> None:
    dtype, compute = WEIGHTS[weight]
    p = problem("ce", weight=dtype, compute=compute)
    truth, eager = exact(p), replaced(p)
    scale_N = torch.rand(7)
    options = {"lr": 0.1, "rounding": "nearest", "weight_decay": decay}
    updated(reference, truth, scale_N, **options)
    g = aten.backward(eager, aten.forward(eager).stats_2N, scale_N).dw_LD
    optimizer = torch.optim.SGD([eager.w_LD], lr=0.1, weight_decay=decay)
    eager.w_LD.grad = g
    optimizer.step()
    updated(aten, p, scale_N, **options)
    assert_within_budget(p.w_LD, truth.w_LD, eager.w_LD, what="updated weight")


def test_fused_and_unfused_agree() -> None:
    p = problem("bce")
    scale_N = torch.rand(7)
    dw = aten.backward(p, torch.empty(0), scale_N).dw_LD
    expected = p.w_LD - 0.1 * (dw + 0.01 * p.w_LD)
    aten.backward_update(p, torch.empty(0), scale_N, Update(lr=0.1, weight_decay=0.01))
    torch.testing.assert_close(p.w_LD, expected)


def test_steps_streams_and_seeds_change_the_bits() -> None:
    def run(**changed: int) -> Tensor:
        p = problem("bce", num_outputs=300, weight=torch.bfloat16, compute=torch.bfloat16)
        updated(aten, p, torch.ones(7), **{"lr": 1e-3, "seed": 1, "step": 1, **changed})
        return p.w_LD

    first = run()
    assert torch.equal(first, run())
    for changed in ({"seed": 2}, {"step": 2}, {"param_id": 1}, {"row_offset": 1}):
        assert not torch.equal(first, run(**changed)), changed


def test_shards_write_the_bits_of_the_whole() -> None:
    whole = problem("bce_dense", weight=FP8, compute=torch.bfloat16, bias=False, integers=True)
    whole.w_LD.zero_()
    y, w = whole.target.round(), whole.w_LD.clone()
    whole = replaced(whole, target=y)
    aten.backward_update(whole, torch.empty(0), torch.ones(7), Update(lr=0.013, seed=4))
    for start, stop in ((0, 20), (20, 53)):
        part = replaced(whole, target=y[:, start:stop])
        part = replaced(part, w_LD=w[start:stop].clone())
        update = Update(lr=0.013, seed=4, row_offset=start)
        aten.backward_update(part, torch.empty(0), torch.ones(7), update)
        assert torch.equal(words(part.w_LD), words(whole.w_LD[start:stop]))


def test_small_updates_survive_in_expectation() -> None:
    """Updates of 1/200 step: nearest loses them all, stochastic rounding keeps their mean."""
    w = torch.full((64, 64), 1.0).bfloat16()
    p = problem("bce", num_rows=2, num_features=64, num_outputs=64, bias=False, positives=0)
    p = replaced(p, x_ND=torch.ones(2, 64), w_LD=w, compute_dtype=torch.bfloat16, chunk=16)
    for step in range(200):
        aten.backward_update(
            p, torch.empty(0), torch.full((2,), 0.5), Update(lr=2.0**-7 / 200, step=step)
        )
    # sigmoid(64) is 1: every update moves by lr.
    mean = float(p.w_LD.float().mean())
    assert mean == pytest.approx(1 - 2.0**-7, abs=5 * 2.0**-7 / 64)


def test_layouts_are_taken_where_they_can_be() -> None:
    def layout(dtype: torch.dtype, features: int, **options: object) -> str:
        w = torch.zeros(8, features).to(dtype)
        update = Update(lr=1.0, **options)  # type: ignore[arg-type]
        return stored.StoredWeight(w, torch.bfloat16, 4, update, False).layout

    assert layout(torch.bfloat16, 8) == "pairs"
    assert layout(FP8, 8) == "quads"
    assert layout(torch.bfloat16, 7) == "plain"
    assert layout(FP8, 6) == "plain"
    assert layout(FP8, 8, rounding="nearest") == "quads"
    assert layout(torch.float32, 8) == "plain"
    state = torch.zeros(8, 8)
    assert layout(torch.bfloat16, 8, state=(state,)) == "plain"
    assert layout(torch.bfloat16, 8, state=(state.bfloat16(),)) == "pairs"
    assert layout(torch.bfloat16, 8, compensation=state.bfloat16()) == "pairs"
    assert layout(FP8, 8, compensation=state.bfloat16()) == "plain"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("weight", "name"),
    [  # each weight and each rule once
        ("bf16", "adamw, bf16"), ("bf16", "adagrad"), ("fp8", "sgd"), ("fp8", "kahan rows"),
        *(pytest.param("bf16", name, marks=SLOW) for name in ("sgd", "kahan rows")),
        *(pytest.param("fp8", name, marks=SLOW) for name in ("adamw, bf16", "adagrad")),
    ],
)  # fmt: skip
def test_threads_do_not_enter(weight: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled vector code on one thread and on two stores the same bits, for any chunk."""
    monkeypatch.setattr(head, "SMALL", 0)
    dtype, compute = WEIGHTS[weight]
    before, results = torch.get_num_threads(), []
    try:
        for threads, chunk in ((1, 64), (2, 64), (2, 29)):
            torch.set_num_threads(threads)
            p = problem(
                "bce", weight=dtype, compute=compute, chunk=chunk, bias=False, integers=True,
                num_outputs=300, num_features=64,
            )  # fmt: skip
            p.w_LD.zero_()
            update = with_copies(UPDATES[name](300, 64))
            aten.backward_update(p, torch.empty(0), torch.full((7,), 0.5), update)
            results.append({"weight": p.w_LD, **tensors(update)})
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in other.items():
            assert torch.equal(words(value), words(results[0][key])), key
