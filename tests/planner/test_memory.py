"""Formulas against hand counts, and against what eager really allocates."""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy
import torch

from elmo_compile.kernels import aten
from elmo_compile.kernels.aten import compiled
from elmo_compile.kernels.problem import HeadProblem
from elmo_compile.kernels.targets import positives_of
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.numerics.state_size import StateSize
from elmo_compile.numerics.update import Update
from elmo_compile.planner import HeadShape, Plan, default_compute_dtype, plan
from elmo_compile.planner import memory as memory_module
from elmo_compile.planner.memory import HeadMemory, head_memory
from elmo_compile.planner.shape import ProgramSize
from elmo_compile.testing.memory import allocated_peak

FP8 = torch.float8_e4m3fn
N, D, L, C, M = sympy.symbols("N D L C M")


MOMENTUM = StateSize("momentum_buffer", torch.float32, Fraction(4))


def head(loss=BCE, targets="padded", dtype=torch.bfloat16, **changes):
    """128 x 768 x 670 091."""
    values = {
        "rows": 128,
        "features": 768,
        "outputs": 670_091,
        "loss": LossSpec(name=loss, targets=targets),
        "weight_dtype": dtype,
        "feature_dtype": torch.bfloat16,
        "compute_dtype": default_compute_dtype(dtype, "cpu"),
    }
    return HeadShape(**{**values, **changes})


def formulas(terms):
    """Expression by name."""
    return {term.name: term.expr for term in terms}


def test_before_bce_by_hand():
    memory = head_memory(head(positives=640), 1024)
    assert formulas(memory.before) == {
        "weight": 2 * L * D,
        "features": 2 * N * D,
        "logits": 2 * N * L,
        "multi-hot targets": 4 * N * L,
        "gradient of the logits": 2 * N * L,
        "feature gradient": 2 * N * D,
        "weight gradient": 2 * L * D,
    }
    weight, logits = 2 * 670_091 * 768, 2 * 670_091 * 128
    features = 2 * 128 * 768
    # The larger moment is the weight gradient's: weight, its gradient, the logits' gradient.
    assert memory.bytes_before == 2 * weight + logits + 2 * features
    assert memory.logits.bytes == logits


def test_before_cross_entropy_in_float32_by_hand():
    memory = head_memory(head(CE, "classes", logits_upcast=True), 1024)
    found = formulas(memory.before)
    assert found["logits in float32"] == 4 * N * L
    assert found["log-probabilities"] == 4 * N * L
    assert found["gradient of the logits"] == 4 * N * L
    assert found["gradient of the logits, cast back"] == 2 * N * L


def test_after_fused_fp8_by_hand():
    memory = head_memory(head(dtype=FP8, fused_update=True, positives=640), 1024)
    assert formulas(memory.after)["weight"] == L * D
    assert "weight gradient" not in formulas(memory.after)
    by_name = formulas(memory.after)
    assert by_name["chunk of weight, decoded"] == 2 * C * D
    assert by_name["chunk of weight gradient"] == 2 * C * D
    assert by_name["chunk of logits, then gradient"] == 2 * N * C
    assert by_name["feature gradient, summed over chunks"] == (4 + 2) * N * D
    assert by_name["sorted positives"] == 16 * M
    # Nothing temporary grows with the outputs.
    assert L not in memory.temporaries.free_symbols


def test_an_unfused_head_returns_its_gradient_in_the_dtype_of_the_ops():
    for dtype, size in ((FP8, 4), (torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8)):
        memory = head_memory(head(dtype=dtype), 64)
        assert formulas(memory.after)["weight gradient"] == size * L * D
        (term,) = [t for t in memory.after if t.name == "weight gradient"]
        assert not term.temporary


def test_optional_terms_only_where_they_exist():
    names = formulas(head_memory(head(), 64).before)
    assert "bias" not in names
    assert not any("moment" in name for name in names)
    found = head_memory(head(has_bias=True, state=(MOMENTUM,)), 64)
    name = "momentum_buffer (float32)"
    assert formulas(found.before)[name] == 4 * L * D == formulas(found.after)[name]
    assert formulas(found.after)["bias gradient"] == 4 * L
    dense = head_memory(head(targets="dense"), 64)
    assert formulas(dense.after)["dense targets (given)"] == 4 * N * L
    assert "multi-hot targets" not in formulas(dense.before)


def test_inference_holds_one_chunk_of_logits():
    memory = head_memory(head(features_trainable=False, weight_trainable=False), 64)
    assert "gradient of the logits" not in formulas(memory.before)
    temporary = {t.name for t in memory.after if t.temporary}
    assert temporary == {
        "chunk of logits, then gradient",
        "features as operands",
        "row reductions, partial",
        "row statistics",
    }


def test_formulas_and_numbers_agree():
    shape = head(dtype=FP8, positives=640, has_bias=True, fused_update=True)
    memory = head_memory(shape, 1024)
    sizes = {N: 128, D: 768, L: 670_091, C: 1024, M: 640}
    assert memory.total_before.subs(sizes) == memory.bytes_before
    assert memory.total_after.subs(sizes) == memory.bytes_after
    assert memory.temporaries.subs(sizes) == memory.temporary_bytes
    for term in (*memory.before, *memory.after):
        assert term.expr.subs(sizes) == term.bytes


@pytest.mark.parametrize(
    ("changes", "products"),
    [
        ({}, 4),
        ({"fused_update": True}, 4),
        ({"fused_update": True, "loss_value": "deferred"}, 3),
        ({"loss_value": "deferred"}, 4),
        ({"weight_trainable": False}, 3),
        ({"features_trainable": False}, 3),
        ({"features_trainable": False, "weight_trainable": False}, 1),
    ],
)
def test_products_and_operations(changes, products):
    found = plan(head(**changes)).traffic
    assert found.products == products
    assert found.operations == 2 * products * N * L * D
    assert found.operations_number == 2 * products * 128 * 670_091 * 768


def test_cross_entropy_needs_four_products_even_deferred():
    shape = head(CE, "classes", fused_update=True, loss_value="deferred")
    assert plan(shape).products == 4


def test_traffic_of_a_fused_update_is_one_read_and_one_write_at_best():
    best = plan(head(dtype=FP8, fused_update=True, loss_value="deferred")).traffic
    assert (best.read, best.written) == (L * D, L * D)
    exact = plan(head(dtype=FP8, fused_update=True)).traffic
    assert exact.read == 2 * L * D
    narrow = StateSize("momentum_buffer", torch.bfloat16, Fraction(2))
    momentum = plan(head(dtype=FP8, fused_update=True, state=(narrow,))).traffic
    assert (momentum.read, momentum.written) == (4 * L * D, 3 * L * D)
    frozen = plan(head(weight_trainable=False)).traffic
    assert frozen.written == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("state", [(), (MOMENTUM,)])
def test_float32_sgd_writes_straight_into_the_weight(dtype, state):
    memory = head_memory(head(dtype=dtype, fused_update=True, state=state), 64)
    made = "chunk of weight gradient" in formulas(memory.after)
    assert made == (dtype != torch.float32 or bool(state))


def test_cuda_keeps_only_the_logit_gradient_and_sums():
    memory = head_memory(head(dtype=FP8, fused_update=True, device="cuda"), 4096)
    temporary = {t.name for t in memory.after if t.temporary}
    assert temporary == {
        "chunk of logit gradient",
        "feature gradient",
        "feature gradient, split sums",
        "row statistics",
        "rounding keys",
    }
    exact = head_memory(head(dtype=torch.float32, fused_update=True, device="cuda"), 4096)
    assert "rounding keys" not in {t.name for t in exact.after}


def test_float16_on_a_cpu_is_computed_in_float32():
    half = {"dtype": torch.float16, "feature_dtype": torch.float16}
    changes = {**half, "compute_dtype": torch.float16, "fused_update": True}
    on_cpu = formulas(head_memory(head(**changes), 64).after)
    assert on_cpu["chunk of logits, then gradient"] == 4 * N * C
    on_cuda = formulas(head_memory(head(**changes, device="cuda"), 64).after)
    assert on_cuda["chunk of logit gradient"] == 2 * N * C


def test_the_kernels_compile_from_the_same_size_on():
    assert memory_module.EAGER_BELOW == compiled.SMALL
    assert memory_module.EAGER_WEIGHT_BELOW == compiled.SMALL_WEIGHT


def problem_of(shape: HeadShape, chunk: int) -> HeadProblem:
    """A call of the planned head, with random numbers."""
    rows, outputs, features = shape.rows, shape.outputs, shape.features
    sparse = shape.loss.name == BCE
    labels = torch.randint(outputs, (rows, 3) if sparse else (rows,))
    return HeadProblem(
        x_ND=torch.randn(rows, features).to(shape.compute_dtype),
        w_LD=(0.1 * torch.randn(outputs, features)).to(shape.weight_dtype),
        b_L=None,
        target=positives_of(shape.loss, labels, None, rows, outputs) if sparse else labels,
        loss=shape.loss,
        chunk=chunk,
        compute_dtype=shape.compute_dtype,
    )


def step_of(shape: HeadShape, problem: HeadProblem, row_block: int = 0):
    """Loss and gradients, or update, as the ops ask the kernels for them."""
    scale_N = torch.full((shape.rows,), 1 / shape.rows)
    deferred = shape.value_in_backward

    def step():
        if shape.at_once:
            aten.loss_and_gradients(problem, scale_N, row_block, need_db=False)
            return
        stats_2N = torch.empty(0) if deferred else aten.forward(problem).stats_2N
        if shape.fused_update:
            flags = {"need_dx": True, "need_db": False, "need_value": deferred}
            aten.backward_update(problem, stats_2N, scale_N, Update(lr=0.1), **flags)
        else:
            aten.backward(problem, stats_2N, scale_N, need_db=False)

    return step


def taken(shape: HeadShape, memory: HeadMemory, problem: HeadProblem, row_block: int = 0) -> int:
    """Bytes of a step's temporaries, as the allocator counts them; all is compiled before."""
    step = step_of(shape, problem, row_block)
    step()
    gradient = sum(t.bytes for t in memory.after if t.name == "weight gradient")
    return allocated_peak(step) - gradient


@pytest.mark.parametrize("fused", [True, False, "deferred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize(
    ("loss", "rows", "outputs"), [(BCE, 64, 16_640), (CE, 512, 4_096), (BCE, 4, 16_640)]
)
def test_the_kernels_stay_within_the_plan(loss, rows, outputs, dtype, fused):
    shape = shape_of(loss, rows, outputs, dtype, fused=fused)
    memory = head_memory(shape, 1024)
    measured = taken(shape, memory, problem_of(shape, 1024))
    assert measured <= 1.15 * memory.temporary_bytes + (256 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize(("loss", "row_block"), [(CE, 128), (CE, 200), (BCE, 0)])
def test_the_kernels_at_once_stay_within_the_plan(loss, row_block, dtype):
    shape = shape_of(loss, 512, 16_384, dtype, at_once=True)
    memory = head_memory(shape, 1024, row_block)
    measured = taken(shape, memory, problem_of(shape, 1024), row_block)
    assert measured <= 1.15 * memory.temporary_bytes + (256 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize(
    ("loss", "rows", "outputs", "changes"),
    [
        (BCE, 128, 65_536, {"fused": True}),
        (BCE, 128, 65_536, {"fused": "deferred"}),
        (BCE, 128, 65_536, {"at_once": True}),
        (CE, 512, 32_768, {"fused": True}),
        (CE, 1024, 32_768, {"at_once": True}),
    ],
)
def test_predictions_are_near_what_a_step_takes(loss, rows, outputs, changes, dtype):
    """With the planner's own chunk: from both sides, within a tenth or 6 MiB."""
    shape = shape_of(loss, rows, outputs, dtype, features=768, **changes)
    found = plan(shape)
    assert isinstance(found, Plan)
    problem = problem_of(shape, found.chunk_size)
    measured = taken(shape, found.memory, problem, found.row_block)
    tolerance = max(found.temporary_bytes // 10, 6 << 20)
    assert abs(measured - found.temporary_bytes) <= tolerance
    assert measured <= 1.1 * found.temporary_bytes


def shape_of(loss, rows, outputs, dtype, *, fused=False, features=256, **changes) -> HeadShape:
    """Sparse BCE or cross entropy; `fused` may be "deferred"."""
    compute = default_compute_dtype(dtype, "cpu")
    return head(
        loss, "padded" if loss == BCE else "classes", dtype, rows=rows, features=features,
        outputs=outputs, fused_update=bool(fused), positives=3 * rows if loss == BCE else 0,
        loss_value="deferred" if fused == "deferred" else "exact", feature_dtype=compute,
        **changes,
    )  # fmt: skip


def test_a_traced_loss_on_cuda_is_planned_as_aten_runs_it():
    """Its chunks of weight are decoded, and its chunks of gradient are tensors."""
    program = ProgramSize(forward=1, backward=3, live=6)
    traced = head(dtype=FP8, fused_update=True, device="cuda", program=program)
    names = {term.name for term in head_memory(traced, 4096).after}
    assert {"chunk of weight, decoded", "chunk of weight gradient"} <= names
    assert "feature gradient, split sums" not in names


def test_split_sums_of_a_small_batch_are_small():
    for rows, most in ((1, 70_000), (16, 1 << 21), (128, 9 << 20), (4096, 9 << 20)):
        memory = head_memory(head(rows=rows, fused_update=True, device="cuda"), 4096)
        (term,) = (t for t in memory.after if t.name == "feature gradient, split sums")
        assert term.bytes - 4 * 768 * rows <= most
