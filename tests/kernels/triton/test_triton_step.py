"""Loss and gradients of the Triton kernels against float64, for every loss, precision and shape."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from elmo_compile.errors import InputError
from elmo_compile.kernels import triton as family
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.numerics.features import round_features
from elmo_compile.numerics.losses import BCE, CE, LossSpec, Positives
from elmo_compile.numerics.update import Update
from kernels.triton.cases import (
    PRECISIONS,
    assert_same_sums,
    check_step,
    make,
    moved,
    scale_of,
)

KINDS = ("bce", "bce_count", "bce_dense", "ce", "ce_dense")
ODD = {"num_rows": 19, "num_features": 45, "num_outputs": 101, "chunk": 40}
QUICK = {("bce", "bf16"), ("bce", "fp8"), ("ce", "bf16"), ("ce", "fp32"), ("bce_count", "fp16")} | {
    ("bce_dense", "fp32"),
    ("ce_dense", "fp8"),
    ("bce", "fp32 as bf16"),
}
SHAPES = [
    # N, D, L, chunk: smaller than a tile, exact tiles, one chunk, one output a chunk
    (1, 7, 5, 3),
    (16, 64, 96, 32),
    (33, 70, 67, 1000),
    (3, 5, 4, 1),
]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        pytest.param(k, p, marks=() if (k, p) in QUICK else pytest.mark.slow)
        for k in KINDS
        for p in PRECISIONS
    ],
)
def test_step_is_within_budget(kind: str, precision: str, device: str) -> None:
    check_step(make(kind, precision, **ODD), device)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_fp8_with_fp8(kind: str, device: str) -> None:
    """From the codes of rounded features: as the products in bf16, which hold the same numbers."""
    p = make(kind, "fp8", **ODD)
    check_step(dataclasses.replace(p, x_ND=round_features(p.x_ND), fp8_features=True), device)


@pytest.mark.parametrize(("n", "d", "num", "chunk"), SHAPES)
@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_shapes(kind: str, n: int, d: int, num: int, chunk: int, device: str) -> None:
    options = {"num_rows": n, "num_features": d, "num_outputs": num, "chunk": chunk}
    check_step(make(kind, "bf16", positives=2, bias=n % 2 == 1, **options), device)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [5, 128, 300])
def test_shapes_of_full_tiles(kind: str, precision: str, rows: int, device: str) -> None:
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    options = {"num_rows": rows, "num_features": 264, "num_outputs": 3001, "chunk": 1100}
    check_step(make(kind, precision, **options), device)


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_any_strides_of_x_targets_and_scale(layout: str, device: str) -> None:
    p = moved(make("bce_dense", "fp32", num_rows=5, num_outputs=20), device)
    x, y = p.x_ND, p.target
    scale = torch.full((5,), 0.25, device=device)
    if layout == "transposed":
        strided = (x.t().contiguous().t(), y.t().contiguous().t(), scale)
    elif layout == "every other":
        strided = (x.repeat_interleave(2, 1)[:, ::2], y.repeat_interleave(3, 0)[::3], scale)
    else:
        x, y = x[:1].expand(5, -1), y[:1].expand(5, -1)
        strided = (x, y, torch.tensor(0.25, device=device).expand(5))
    plain = dataclasses.replace(p, x_ND=x.contiguous(), target=y.contiguous())
    other = dataclasses.replace(p, x_ND=strided[0], target=strided[1])
    assert_same_sums(family.forward(plain).rows_N, family.forward(other).rows_N)
    empty = x.new_empty(0)
    expected = family.backward(plain, empty, scale)
    for a, b in zip(expected[:3], family.backward(other, empty, strided[2])[:3]):
        assert_same_sums(a, b)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_dense_targets_of_any_type(dtype: torch.dtype, device: str) -> None:
    p = moved(make("bce_dense", "fp32", num_rows=4, num_outputs=20), device)
    y = p.target > 0.5
    as_float = dataclasses.replace(p, target=y.float())
    as_dtype = dataclasses.replace(p, target=y.to(dtype))
    assert_same_sums(family.forward(as_float).rows_N, family.forward(as_dtype).rows_N)


@pytest.mark.parametrize("kind", KINDS)
def test_value_in_the_update_pass_is_forward_s(kind: str, device: str) -> None:
    p = moved(make(kind, "bf16", num_rows=5, num_outputs=70, chunk=40), device)
    first = family.forward(p)
    scale = scale_of(p).to(device)
    expected = family.backward(p, first.stats_2N, scale)
    got = family.backward_update(p, first.stats_2N, scale, Update(lr=0.1), need_value=True)
    torch.testing.assert_close(got.rows_N, first.rows_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.dx_ND, expected.dx_ND, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.db_L, expected.db_L, rtol=1e-6, atol=1e-6)


def test_no_positive_in_the_batch_is_all_negatives(device: str) -> None:
    p = make("bce_dense", "fp32", num_rows=3, num_outputs=20)
    none = torch.empty(0, dtype=torch.int64)
    padding = Positives(torch.zeros(4, dtype=torch.int64), torch.full((4,), 20), None)
    zeros = moved(dataclasses.replace(p, target=torch.zeros(3, 20)), device)
    rows = family.forward(zeros).rows_N
    for target in (Positives(none, none, None), padding):
        spec = LossSpec(name=BCE, targets="pairs")
        sparse = moved(dataclasses.replace(p, target=target, loss=spec), device)
        torch.testing.assert_close(family.forward(sparse).rows_N, rows, rtol=1e-6, atol=0)


def test_more_positives_in_a_tile_than_are_taken_at_once(device: str) -> None:
    p = make("bce_dense", "fp32", num_rows=17, num_outputs=40)
    y = (torch.rand(17, 40) < 0.7).float()
    cols, rows = y.t().nonzero(as_tuple=True)
    values = torch.rand(len(rows))
    y_soft = y.clone()
    y_soft[rows, cols] = values
    for target, given in ((y, None), (y_soft, values)):
        dense = moved(dataclasses.replace(p, target=target), device)
        spec = LossSpec(name=BCE, targets="pairs")
        pairs = dataclasses.replace(p, target=Positives(rows, cols, given), loss=spec)
        sparse = moved(pairs, device)
        assert_same_sums(family.forward(dense).rows_N, family.forward(sparse).rows_N)


@pytest.mark.parametrize(("kind", "z"), [("bce", 20.0), ("ce", 8.0)])
def test_confident_positive_keeps_its_gradient(kind: str, z: float, device: str) -> None:
    """`sigmoid(z) - 1` and `p - 1` are 0 in bf16 here, the first in float32 too."""
    w = torch.tensor([[z], [0.0]], dtype=torch.bfloat16)
    target = torch.tensor([0])
    spec = LossSpec(name=CE, targets="classes")
    if kind == "bce":
        zero = torch.tensor([0])
        target, spec = Positives(zero, zero, None), LossSpec(name=BCE, targets="pairs")
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    p = HeadProblem(
        x_ND=x, w_LD=w, b_L=None, target=target, loss=spec, chunk=2, compute_dtype=torch.bfloat16
    )
    p = moved(p, device)
    stats = family.forward(p).stats_2N
    dw = family.backward(p, stats, torch.ones(1, device=device)).dw_LD
    assert float(dw[0]) == pytest.approx(-1 / (1 + math.exp(z)), rel=0.01)


def test_ignored_rows_have_neither_loss_nor_gradient(device: str) -> None:
    p = moved(make("ce", "fp32", num_rows=4), device)
    p = dataclasses.replace(p, target=torch.full_like(p.target, -100))
    first = family.forward(p)
    assert torch.equal(first.rows_N, torch.zeros(4, device=device))
    for gradient in family.backward(p, first.stats_2N, torch.ones(4, device=device))[:3]:
        assert not gradient.any()


def test_loss_does_not_depend_on_the_chunk_or_an_offset(device: str) -> None:
    p = moved(make("ce", "fp32", num_rows=4, num_outputs=100), device)
    rows = family.forward(p).rows_N
    assert torch.equal(family.forward(dataclasses.replace(p, chunk=33)).rows_N, rows)
    far = dataclasses.replace(p, b_L=p.b_L + 1024)
    torch.testing.assert_close(family.forward(far).rows_N, rows, rtol=2e-4, atol=2e-4)


def test_class_out_of_range_is_nan_not_a_stray_read(device: str) -> None:
    p = moved(make("ce", "fp32", num_rows=4), device)
    p.target[0] = 10**12
    rows = family.forward(p).rows_N
    assert torch.isnan(rows[0])
    assert torch.isfinite(rows[1:]).all()


def test_unequal_and_zero_scales(device: str) -> None:
    p = moved(make("bce", "fp16", num_rows=4), device)
    empty = p.x_ND.new_empty(0)
    zero = family.backward(p, empty, torch.zeros(4, device=device))
    assert all(not gradient.any() for gradient in zero[:3])
    # torch's mean over N L at 2.8 million outputs: far below what float16 holds.
    tiny = family.backward(p, empty, torch.full((4,), 2.0**-30, device=device))
    one = family.backward(p, empty, torch.ones(4, device=device))
    assert torch.equal(tiny.dx_ND * 2.0**30, one.dx_ND)
    assert torch.equal(tiny.db_L * 2.0**30, one.db_L)


def test_empty_batch(device: str) -> None:
    p = moved(make("bce_dense", "fp32", num_rows=2), device)
    p = dataclasses.replace(p, x_ND=p.x_ND[:0], target=p.target[:0])
    assert family.forward(p).rows_N.shape == (0,)
    got = family.backward(p, p.x_ND.new_empty(0), p.x_ND.new_empty(0))
    assert got.dx_ND.shape == (0, 12)
    assert not got.dw_LD.any()
    assert not got.db_L.any()


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 3, 40])
def test_nothing_unwritten_is_returned(kind: str, rows: int, poisoned: None, device: str) -> None:
    p = make(kind, "fp8", num_rows=max(rows, 2), num_outputs=70, chunk=40)
    if not rows and not isinstance(p.target, Positives):
        p = dataclasses.replace(p, target=p.target[:0])
    elif not rows:
        none = torch.empty(0, dtype=torch.int64)
        p = dataclasses.replace(p, target=Positives(none, none, None))
    p = moved(dataclasses.replace(p, x_ND=p.x_ND[:rows]), device)
    made = family.forward(p)
    results = family.backward(p, made.stats_2N, p.x_ND.new_ones(rows).float(), need_value=True)
    for tensor in (made.rows_N, made.stats_2N, *results[:4]):
        assert bool(torch.isfinite(tensor).all())
    assert rows or not results.db_L.any()


def test_rows_past_the_batch_stay_out_of_the_bias_of_large_logits(device: str) -> None:
    p = make("ce_dense", "fp32", num_rows=5, num_outputs=70)
    p = moved(dataclasses.replace(p, b_L=torch.full((70,), 100.0)), device)
    check_step(p, device)


def test_float64_is_refused_with_the_remedy() -> None:
    p = dataclasses.replace(make("ce", "fp32"), compute_dtype=torch.float64)
    with pytest.raises(InputError, match="float64 runs in the reference kernels"):
        family.forward(p)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_topk_matches_the_logits_and_ties_go_to_the_lower_index(
    precision: str, device: str
) -> None:
    p = moved(make("ce", precision, num_rows=9, num_outputs=70, integers=True), device)
    z = p.x_ND.float() @ p.w_LD.float().t()
    order = (-z).sort(dim=1, stable=True)
    for chunk in (7, 33, 1000):
        values, indices = family.topk(p.x_ND, p.w_LD, None, 6, chunk, p.compute_dtype)
        assert torch.equal(values, -order.values[:, :6])
        assert torch.equal(indices, order.indices[:, :6])
    with pytest.raises(InputError, match="k=71"):
        family.topk(p.x_ND, p.w_LD, None, 71, 8, p.compute_dtype)


def test_large_dense_targets_do_not_overflow_float16(device: str) -> None:
    """Stored gradients are scaled up; those of targets that are no marks are scaled less."""
    p = make("bce_dense", "fp16", num_rows=5, num_outputs=70)
    p = moved(dataclasses.replace(p, target=p.target * 100), device)
    check_step(p, device)
