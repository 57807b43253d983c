"""Compiled pieces write what the same functions write eagerly, and are compiled once.

The compiler is real here: each piece takes seconds, so few are tried and they are shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters, get_compilation_metrics
from torch._inductor import ir
from torch._inductor.loop_body import LoopBody
from torch.utils.flop_counter import FlopCounterMode

from elmo_compile.kernels import aten
from elmo_compile.kernels.aten import compiled, head, steps, stored
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.update import Update

from .head_cases import FP8, problem

pytestmark = pytest.mark.filterwarnings("error:elmo_compile. Inductor could not:RuntimeWarning")


@pytest.fixture
def compile_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SMALL", 0)


@pytest.fixture
def fresh() -> Iterator[None]:
    compiled.reset()
    yield
    compiled.reset()


def step(p: HeadProblem, rows: int, **options: Any) -> Tensor:
    stats_2N = aten.forward(p).stats_2N
    update = Update(**{"lr": 0.05, "seed": 3, **options})
    result = aten.backward_update(p, stats_2N, torch.full((rows,), 1 / rows), update)
    return result.dx_ND


@pytest.mark.parametrize("weight", [torch.bfloat16, FP8])
def test_same_weights_as_eager(weight: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for small in (0, 1 << 60):
        monkeypatch.setattr(head, "SMALL", small)
        p = problem(
            "bce", num_rows=16, num_features=32, num_outputs=700, weight=weight,
            compute=torch.bfloat16, chunk=64, bias=False, integers=True,
        )  # fmt: skip
        p.w_LD.zero_()
        dx = step(p, 16)
        results.append((p.w_LD, dx))
    assert torch.equal(results[0][0].view(torch.uint8), results[1][0].view(torch.uint8))
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.usefixtures("compile_all")
def test_nothing_compiles_again() -> None:
    """Not for another N, L, D, ragged chunk, learning rate, step or seed; also where N = D = C."""

    def run(rows: int, features: int, outputs: int, chunk: int, **options: Any) -> None:
        p = problem(
            "bce", num_rows=rows, num_features=features, num_outputs=outputs, chunk=chunk,
            weight=torch.bfloat16, compute=torch.bfloat16, bias=False,
        )  # fmt: skip
        step(p, rows, **options)

    run(32, 32, 96, 32)
    before = counters["stats"]["unique_graphs"]
    run(16, 48, 700, 64, lr=0.1)
    run(17, 20, 129, 64, lr=0.0, step=1)
    run(8, 8, 40, 39, lr=1.0, step=1 << 40, seed=9)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.usefixtures("fresh")
def test_a_large_weight_is_updated_by_vector_code_with_few_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = problem("bce", num_rows=2, num_features=32, weight=torch.bfloat16, compute=torch.bfloat16)
    step(p, 2)
    assert not compiled._cache
    monkeypatch.setattr(stored, "SMALL_WEIGHT", p.w_LD.numel())
    step(p, 2)
    assert [key[0] for key in compiled._cache] == [steps.lanes_]


@pytest.mark.usefixtures("compile_all", "fresh")
@pytest.mark.parametrize(("loss", "weight"), [("bce", FP8), ("ce", torch.bfloat16)])
def test_each_piece_is_traced_once(loss: str, weight: torch.dtype) -> None:
    """No constant of the source is taken for a variable, which makes Dynamo start again; and a call
    inside an op, below autograd's dispatch keys, shares its code with one outside."""
    p = problem(
        loss, num_rows=16, num_features=32, num_outputs=700, weight=weight,
        compute=torch.bfloat16, chunk=64, bias=False,
    )  # fmt: skip
    before, seen = counters["stats"]["unique_graphs"], len(get_compilation_metrics())
    with torch._C._AutoDispatchBelowADInplaceOrView():
        step(p, 16)
    step(p, 16)
    assert counters["stats"]["unique_graphs"] - before == len(compiled._cache)
    assert not any(metric.restart_reasons for metric in get_compilation_metrics()[seen:])


@pytest.mark.usefixtures("fresh")
def test_a_value_read_twice_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten values, each read three times by the next: 3^10 operations where Inductor inlines."""
    traced: list[int] = []
    trace = LoopBody._init_with_tracing

    def counted(self: Any, *args: Any) -> None:
        trace(self, *args)
        traced.append(len(self.root_block.graph.nodes))

    def chain_(x: Tensor) -> None:
        v = x
        for _ in range(10):
            v = v * v - v
        x.copy_(v)

    monkeypatch.setattr(LoopBody, "_init_with_tracing", counted)
    made = ir.Pointwise.make_loader
    x = torch.rand(7, 33)
    expected = x.clone()
    chain_(expected)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled.piece(chain_, use_compiled=True)(x)
    assert torch.allclose(x, expected, rtol=1e-5)
    assert 0 < max(traced) < 100
    assert ir.Pointwise.make_loader is made


def summed(z: Tensor, y: Tensor) -> Tensor:
    return (z.float() * y.float()).sum(0)


@pytest.mark.usefixtures("fresh")
def test_parts_of_wider_tensors_share_their_code() -> None:
    """Chunks of dense targets, by rows or by columns, and views of what is held for the step: no
    stride and no size of what they are a part of is taken for a size of theirs."""
    sums = compiled.piece(summed, use_compiled=True)

    def run(*sizes: int, wide: int) -> None:
        wider = torch.rand(wide + 9, *sizes[1:])[2 : sizes[0] + 2], torch.rand(sizes[-1], wide)
        z, y = wider[0], wider[1][:, 3 : sizes[0] + 3].t()
        for parts in ((z, y), (z[: sizes[0] - 3], y[3:]), (z.t(), y.t())):
            assert torch.allclose(sums(*parts), summed(*parts))

    before = counters["stats"]["unique_graphs"]
    run(12, 7, wide=40)
    run(30, 5, wide=30 + 12)
    run(17, 17, wide=34)
    assert counters["stats"]["unique_graphs"] - before == len(compiled._cache)


@pytest.mark.usefixtures("compile_all", "fresh")
def test_without_a_compiler_it_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nmore text")

    monkeypatch.setattr(torch, "compile", broken)
    p = problem("bce", weight=torch.bfloat16, compute=torch.bfloat16, bias=False)
    with pytest.warns(RuntimeWarning, match="RuntimeError: no working C") as caught:
        step(p, 7)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(p, 7)


def test_inductor_still_drops_alpha() -> None:
    """Why compiled updates here never write `add(w, a @ b, alpha=-lr)`.

    When this fails, Inductor was repaired and the warning in `compiled.py` can go.
    """
    w, a, b = torch.zeros(64, 32), torch.ones(64, 16), torch.ones(16, 32)
    run = torch.compile(lambda w, a, b: torch.add(w, a @ b, alpha=-0.5))
    with torch.no_grad():
        wrong = run(w, a, b)
    if torch.__version__.startswith("2.13"):
        assert bool((wrong == 16).all())
    spelled_out = torch.compile(lambda w, a, b: w - 0.5 * (a @ b))
    with torch.no_grad():
        assert bool((spelled_out(w, a, b) == -8).all())


def test_update_without_rounding_steps_the_right_way() -> None:
    """The update written as one product with an epilogue: bf16 and float32, alpha honoured."""
    for dtype in (torch.float32, torch.bfloat16):
        w, g, x = torch.zeros(64, 32), torch.ones(64, 16), torch.ones(16, 32)
        w, g, x = w.to(dtype), g.to(dtype), x.to(dtype)
        torch.addmm(w, g, x, beta=0.5, alpha=-0.25, out=w)
        assert bool((w == -4).all())


@pytest.mark.usefixtures("compile_all")
def test_under_a_dispatch_mode_pieces_run_eagerly() -> None:
    """Dynamo runs nothing compiled under one: counting a step's operations must still work."""
    p = problem("bce", weight=torch.bfloat16, compute=torch.bfloat16)
    step(p, 7)
    with FlopCounterMode(display=False) as counted:
        step(p, 7)
    assert counted.get_total_flops() >= 3 * 2 * 7 * 12 * 53
