"""Formulas against hand counts, and against what eager really allocates."""

from __future__ import annotations

import pytest
import sympy
import torch

from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.planner import HeadShape, default_compute_dtype, plan
from elmo_compile.planner.memory import head_memory

FP8 = torch.float8_e4m3fn
N, D, L, C, M = sympy.symbols("N D L C M")


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
    assert by_name["decoded chunk of weight"] == 2 * C * D
    assert by_name["chunk of logits"] == 4 * N * C
    assert by_name["chunk of logit gradient"] == 2 * N * C
    assert by_name["feature gradient accumulator"] == 4 * N * D
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
    assert "momentum" not in names
    found = head_memory(head(has_bias=True, momentum_dtype=torch.float32), 64)
    assert formulas(found.before)["momentum"] == 4 * L * D == formulas(found.after)["momentum"]
    assert formulas(found.after)["bias gradient"] == 4 * L
    dense = head_memory(head(targets="dense"), 64)
    assert formulas(dense.after)["dense targets (given)"] == 4 * N * L
    assert "multi-hot targets" not in formulas(dense.before)


def test_inference_holds_one_chunk_of_logits():
    memory = head_memory(head(features_trainable=False, weight_trainable=False), 64)
    assert "gradient of the logits" not in formulas(memory.before)
    temporary = {t.name for t in memory.after if t.temporary}
    assert temporary == {"chunk of logits", "row statistics"}


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
    momentum = plan(head(dtype=FP8, fused_update=True, momentum_dtype=torch.bfloat16)).traffic
    assert (momentum.read, momentum.written) == (4 * L * D, 3 * L * D)
    frozen = plan(head(weight_trainable=False)).traffic
    assert frozen.written == 0
