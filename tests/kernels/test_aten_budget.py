"""The CPU kernels against float64, within twice the error torch makes at the same precision."""

from __future__ import annotations

import pytest
import torch

from elmo_compile.kernels import aten, reference
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.update import Update
from elmo_compile.testing.budget import assert_within_budget

from .head_cases import FP8, exact, in_torch, problem, replaced

KINDS = ["bce", "bce_count", "bce_dense", "ce", "ce_dense"]
SEEDS = 12
"""Problems taken together: one of them alone is too few numbers to compare errors of."""
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp8": (FP8, torch.bfloat16),
    "fp8 in float32": (FP8, torch.float32),
    "float32 in bf16": (torch.float32, torch.bfloat16),
}


def check(*problems: HeadProblem, scale_N: torch.Tensor | None = None) -> None:
    """forward, backward and backward_update of some problems, their errors taken together."""
    results = [_one(p, scale_N) for p in problems]
    for what in results[0]:
        actual, truth, same = (torch.cat(parts) for parts in zip(*(r[what] for r in results)))
        assert_within_budget(actual, truth, same, what=what)


def _one(p: HeadProblem, scale_N: torch.Tensor | None) -> dict[str, tuple[torch.Tensor, ...]]:
    """(actual, exact, torch's) of each result."""
    scale_N = torch.rand(p.x_ND.shape[0]) if scale_N is None else scale_N
    truth = exact(p)
    rows64_N, stats64_N = reference.forward(truth)
    true = reference.backward(truth, stats64_N, scale_N.double())
    same = in_torch(p, scale_N)
    forward = aten.forward(p)
    got = aten.backward(p, forward.stats_2N, scale_N)
    update = Update(lr=0.1)
    fused = aten.backward_update(replaced(p), forward.stats_2N, scale_N, update, need_value=True)
    results = {
        "rows": (forward.rows_N, rows64_N, same.rows_N),
        "fused rows": (fused.rows_N, rows64_N, same.rows_N),
        "dx": (got.dx_ND, true.dx_ND, same.dx_ND),
        "fused dx": (fused.dx_ND, true.dx_ND, same.dx_ND),
        "dw": (got.dw_LD, true.dw_LD, same.dw_LD),
    }
    if p.b_L is not None:
        results["db"] = (got.db_L, true.db_L, same.db_L)
        results["fused db"] = (fused.db_L, true.db_L, same.db_L)
    return {what: tuple(t.detach() for t in result) for what, result in results.items()}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 12, 53), (16, 20, 101), (1, 3, 5)])
def test_budget(kind: str, dtypes: str, shape: tuple[int, int, int]) -> None:
    weight, compute = DTYPES[dtypes]
    rows, features, outputs = shape
    for bias in (False, True):
        check(
            *(
                problem(
                    kind,
                    num_rows=rows,
                    num_features=features,
                    num_outputs=outputs,
                    weight=weight,
                    compute=compute,
                    bias=bias,
                    seed=seed,
                )
                for seed in range(SEEDS if rows > 1 else 10 * SEEDS)
            )
        )


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind: str) -> None:
    """The exact result is float64 too, so this is agreement and not a budget."""
    p = problem(kind, weight=torch.float64, compute=torch.float64)
    scale_N = torch.rand(7, dtype=torch.float64)
    stats_2N = aten.forward(p).stats_2N
    torch.testing.assert_close(aten.forward(p), reference.forward(p))
    torch.testing.assert_close(
        aten.backward(p, stats_2N, scale_N), reference.backward(p, stats_2N, scale_N)
    )


@pytest.mark.parametrize("chunk", [1, 52, 53, 1000])
@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_any_chunk(kind: str, chunk: int) -> None:
    for weight, compute in (DTYPES["float32"], DTYPES["fp8"]):
        check(
            *(
                problem(kind, chunk=chunk, weight=weight, compute=compute, seed=seed)
                for seed in range(SEEDS)
            )
        )


@pytest.mark.parametrize("kind", KINDS)
def test_float16_computes_in_float32(kind: str) -> None:
    p = problem(kind, weight=torch.float16, compute=torch.float16)
    truth = reference.forward(exact(p))
    torch.testing.assert_close(aten.forward(p).rows_N.double(), truth.rows_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["zero", "signed", "tiny"])
def test_row_scales(scale: str) -> None:
    scales_N = {
        "zero": torch.zeros(7),
        "signed": torch.tensor([0.0, -3.0, 1e-4, 2.0, -1e-7, 1.0, 0.5]),
        "tiny": torch.full((7,), 1 / (128 * 3_000_000)),
    }[scale]
    for weight, compute in (DTYPES["float32"], DTYPES["bf16"]):
        for kind in ("bce", "ce"):
            check(
                *(problem(kind, weight=weight, compute=compute, seed=s) for s in range(SEEDS)),
                scale_N=scales_N,
            )


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, FP8])
def test_zero_scale_changes_nothing(weight: torch.dtype) -> None:
    compute = torch.float32 if weight == torch.float32 else torch.bfloat16
    p = problem("bce", weight=weight, compute=compute)
    before = p.w_LD.clone()
    result = aten.backward_update(p, torch.empty(0), torch.zeros(7), Update(lr=1.0))
    assert torch.equal(p.w_LD.float(), before.float())
    assert not result.dx_ND.any()
    assert not result.db_L.any()


def test_all_rows_ignored() -> None:
    for weight, compute in (DTYPES["float32"], DTYPES["bf16"]):
        p = problem("ce", weight=weight, compute=compute)
        p = replaced(p, target=torch.full((7,), -100))
        before = p.w_LD.clone()
        forward = aten.forward(p)
        assert not forward.rows_N.any()
        result = aten.backward_update(p, forward.stats_2N, torch.ones(7), Update(lr=1.0))
        assert torch.equal(p.w_LD, before)
        assert not result.dx_ND.any()


def test_no_positive_at_all() -> None:
    check(*(problem("bce", positives=0, seed=seed) for seed in range(SEEDS)))


@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_large_common_offset(kind: str) -> None:
    problems = [problem(kind, seed=seed) for seed in range(SEEDS)]
    check(*(replaced(p, b_L=p.b_L + 3000) for p in problems))
    check(*(replaced(p, b_L=p.b_L - 3000) for p in problems))


def test_confident_bf16_gradient_does_not_cancel() -> None:
    """`sigmoid(z) - 1` in bf16 is 0 from z = 6.24, `p - 1` is far off long before."""
    num = 40
    x, w = torch.eye(4, 8), torch.zeros(num, 8)
    w[torch.arange(4), torch.arange(4)] = torch.tensor([6.0, 8.0, 10.0, 14.0])
    target = torch.arange(4).unsqueeze(1)
    for kind in ("bce", "ce"):
        p = problem(kind, num_rows=4, num_features=8, num_outputs=num, bias=False)
        spec_target = target.squeeze(1)
        if kind == "bce":
            from elmo_compile.kernels.targets import positives_of

            spec_target = positives_of(p.loss, target, None, 4, num)
        p = replaced(
            p,
            x_ND=x.bfloat16(),
            w_LD=w.bfloat16(),
            target=spec_target,
            compute_dtype=torch.bfloat16,
        )
        truth = exact(p)
        dw64 = reference.backward(truth, reference.forward(truth).stats_2N, torch.ones(4)).dw_LD
        dw = aten.backward(p, aten.forward(p).stats_2N, torch.ones(4)).dw_LD
        at = (torch.arange(4), torch.arange(4))
        torch.testing.assert_close(dw[at].double(), dw64[at], rtol=0.01, atol=0)


def test_outputs_masked_by_an_infinite_bias() -> None:
    """Whole chunks of -inf, before and after finite logits far below zero."""
    p = problem("ce", chunk=10)
    bias_L = torch.full((53,), -torch.inf)
    bias_L[25:35] = -2000.0
    target = torch.tensor([25, 26, 27, -100, 33, 34, 30])
    p = replaced(p, b_L=bias_L, target=target)
    rows_N, stats_2N = aten.forward(p)
    expected = reference.forward(exact(p))
    torch.testing.assert_close(
        stats_2N.double().sum(0), expected.stats_2N.sum(0), rtol=1e-6, atol=0
    )
    z_NL = p.x_ND @ p.w_LD.t() + bias_L
    torch_rows = torch.nn.functional.cross_entropy(z_NL, target, reduction="none")
    torch.testing.assert_close(rows_N, torch_rows, rtol=1e-4, atol=1e-3)
    grads = aten.backward(p, stats_2N, torch.ones(7))
    assert all(bool(t.isfinite().all()) for t in grads[:3])


@pytest.mark.parametrize(
    "levels",
    [
        (0, 70, 60, -500, 300, 301),
        (-300, -200, -310, -90, -20, 50),
        (80, 0, 200, -torch.inf, 100, 200),
        (-torch.inf, -150, -torch.inf, -60, 3e4, -3e4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_that_leap_from_chunk_to_chunk(levels, dtype) -> None:
    """Further than float32 holds exponentials, and than the maximum so far is good for; by row."""
    p = problem("ce", chunk=10)
    bias_L = torch.tensor(levels, dtype=torch.float32).repeat_interleave(10)[:53]
    x_ND = p.x_ND.clone()
    x_ND[::2] *= 4.0  # so that some rows leap further than others
    target = torch.full((7,), 52)
    p = replaced(p, x_ND=x_ND.to(dtype), w_LD=p.w_LD.to(dtype), b_L=bias_L, target=target)
    p = replaced(p, compute_dtype=dtype)
    expected = reference.forward(exact(p)).stats_2N.sum(0)
    found = aten.forward(p).stats_2N.double().sum(0)
    apart = {torch.bfloat16: 2e-2, torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found, expected, rtol=apart, atol=apart)


def test_logits_of_twenty_do_not_lose_the_softmax() -> None:
    """A log-sum-exp in one float32, or from logits rounded in another order, errs twice as much."""
    ratios = []
    for seed in range(40):
        p = problem("ce", num_rows=6, num_features=33, num_outputs=66, bias=False, seed=seed)
        p.w_LD.mul_(1 / 0.3)
        scale_N = torch.ones(6)
        truth = exact(p)
        true = reference.backward(truth, reference.forward(truth).stats_2N, scale_N.double()).dx_ND
        ours = aten.backward(p, aten.forward(p).stats_2N, scale_N).dx_ND
        errors = [float((dx - true).square().mean()) for dx in (ours, in_torch(p, scale_N).dx_ND)]
        ratios.append((errors[0] / errors[1]) ** 0.5)
    assert torch.tensor(ratios).median() < 1.25
