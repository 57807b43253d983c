"""The chunk: from the cache, from the budget, from the user; never more than the outputs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_compile import planner
from elmo_compile.config import Options
from elmo_compile.errors import OptionError
from elmo_compile.numerics.losses import BCE, CE, LossSpec
from elmo_compile.planner import HeadShape, Plan, PlanRefusal, choose, limits_for, plan
from elmo_compile.planner.device import MIB, _kernel_size, cpu_cache_bytes
from elmo_compile.planner.shape import ProgramSize

FP8 = torch.float8_e4m3fn
LIMITS = limits_for("cpu", 32 * MIB)


def shape(rows=128, outputs=670_091, dtype=torch.bfloat16, loss=BCE, **changes):
    """A head as the tests vary it: sparse BCE or cross entropy, D = 768, fused."""
    targets = "padded" if loss == BCE else "classes"
    values = {
        "rows": rows,
        "features": 768,
        "outputs": outputs,
        "loss": LossSpec(name=loss, targets=targets),
        "weight_dtype": dtype,
        "feature_dtype": torch.bfloat16,
        "compute_dtype": planner.default_compute_dtype(dtype, "cpu"),
        "fused_update": True,
        "positives": 0 if loss == CE else 5 * rows,
    }
    return HeadShape(**{**values, **changes})


def made(*args, **kwargs) -> Plan:
    """The plan, which must exist."""
    found = plan(*args, **kwargs)
    assert isinstance(found, Plan)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize("loss", [BCE, CE])
@pytest.mark.parametrize(("rows", "most"), [(128, 64 * MIB), (2048, 100 * MIB)])
def test_default_temporaries_are_small(rows, most, loss, dtype):
    found = made(shape(rows, dtype=dtype, loss=loss), None, LIMITS)
    assert found.temporary_bytes < most
    assert found.chunk_size >= 1024
    assert found.chunk_size % 128 == 0
    assert found.saves == (found.logits_bytes > 4 * found.temporary_bytes)
    assert found.saves


def test_more_rows_make_the_chunk_smaller_down_to_the_minimum():
    sizes = (128, 512, 2048, 4096, 1 << 20)
    chunks = [made(shape(rows), None, LIMITS).chunk_size for rows in sizes]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] > chunks[-1] == LIMITS.min_chunk


def test_a_problem_too_small_to_compile_gets_small_chunks():
    small = {"outputs": 4000, "features": 1000}
    assert made(shape(1, **small), None, LIMITS).chunk_size == LIMITS.min_chunk
    assert made(shape(300, **small), None, LIMITS).chunk_size > LIMITS.min_chunk
    assert made(shape(1, **{**small, "features": 1100}), None, LIMITS).chunk_size > LIMITS.min_chunk


def test_a_larger_cache_makes_the_chunk_larger():
    small, large = (made(shape(), None, limits_for("cpu", c * MIB)) for c in (32, 256))
    assert small.chunk_size < large.chunk_size


def test_cuda_chunks_keep_the_matrix_units_busy():
    head = shape(device="cuda")
    found = made(head, None, limits_for("cuda", 50 * MIB))
    assert found.chunk_size >= 4096
    assert "chunk of weight gradient" not in {term.name for term in found.memory.after}
    assert made(shape(1 << 16, device="cuda")).chunk_size == 4096


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16])
@pytest.mark.parametrize("outputs", [670_091, 1_305_265, 2_812_281, 8_600_000])
def test_cuda_chunks_are_worth_starting(outputs, dtype):
    """Few and alike; what they take stays far below the logits."""
    head = shape(outputs=outputs, dtype=dtype, device="cuda")
    found = made(head)
    chunks = -(-outputs // found.chunk_size)
    assert 2 * 128 * 768 * found.chunk_size > choose.ENOUGH_OPERATIONS / 2
    assert outputs - (chunks - 1) * found.chunk_size > 0.9 * found.chunk_size
    assert found.saves
    assert found.temporary_bytes <= 80 * MIB


@pytest.mark.parametrize("budget", [None, "64MiB"])
@pytest.mark.parametrize("loss", [BCE, CE])
def test_a_loss_without_gradients_on_cuda_has_no_temporaries_of_a_chunk(loss, budget):
    still = {"features_trainable": False, "weight_trainable": False, "fused_update": False}
    head = shape(outputs=2_812_281, loss=loss, device="cuda", **still)
    found = made(head, Options(memory_budget=budget))
    assert found.chunk_size > 4096
    assert found.temporary_bytes <= 64 * MIB


@given(st.integers(1, 3_000_000), st.integers(1, 1024), st.sampled_from([None, "64MiB"]))
def test_the_last_chunk_of_a_traced_loss_needs_no_code_of_its_own(outputs, rows, budget):
    head = shape(rows=rows, outputs=outputs, program=ProgramSize(forward=1, backward=1, live=4))
    chunk = made(head, Options(memory_budget=budget), LIMITS).chunk_size
    last = (outputs - 1) % chunk + 1
    assert (last > choose.LONGEST_SUM) == (chunk > choose.LONGEST_SUM)
    assert chunk >= min(1024, outputs)


@pytest.mark.parametrize("outputs", [1, 63, 64, 1000, 1024])
def test_never_more_than_the_outputs(outputs):
    assert made(shape(outputs=outputs)).chunk_size == outputs
    assert made(shape(outputs=outputs), Options(chunk_size=10**9)).chunk_size == outputs
    assert made(shape(outputs=outputs), Options(memory_budget="1TiB")).chunk_size == outputs


@pytest.mark.parametrize("chunk", [1, 7, 64, 12_345])
def test_an_explicit_chunk_wins(chunk):
    assert made(shape(), Options(chunk_size=chunk)).chunk_size == chunk
    found = made(shape(), Options(chunk_size=chunk, memory_budget=1000))
    assert found.chunk_size == chunk
    assert "exceed memory_budget=1000" in found.notes[0]
    assert made(shape(), Options(chunk_size=chunk, memory_budget="1TiB")).notes == ()


@pytest.mark.parametrize(
    ("dtype", "loss", "budget"),
    list(itertools.product([torch.float32, torch.bfloat16, FP8], [BCE, CE], ["3MiB", "1GiB"])),
)
def test_a_budget_is_an_upper_bound(dtype, loss, budget):
    options = Options(memory_budget=budget)
    found = made(shape(dtype=dtype, loss=loss), options, LIMITS)
    assert found.temporary_bytes <= options.budget_bytes
    # It is a bound and not a wish: more than the cache holds would only be slower.
    assert found.chunk_size <= made(shape(dtype=dtype, loss=loss), None, LIMITS).chunk_size


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4096),
    features=st.integers(1, 2048),
    outputs=st.integers(1, 10**7),
    budget=st.integers(1, 1 << 28),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, FP8]),
    fused=st.booleans(),
)
def test_within_the_budget_or_a_budget_that_works(rows, features, outputs, budget, dtype, fused):
    head = shape(rows, outputs, dtype, features=features, fused_update=fused)
    found = plan(head, Options(memory_budget=budget), LIMITS)
    if isinstance(found, PlanRefusal):
        assert found.smallest_budget > budget
        assert str(found.smallest_budget) in found.remedy
        found = plan(head, Options(memory_budget=found.smallest_budget), LIMITS)
        assert isinstance(found, Plan)
        assert found.chunk_size == min(64, outputs)
        below = Options(memory_budget=found.temporary_bytes - 1)
        assert isinstance(plan(head, below, LIMITS), PlanRefusal)
    else:
        assert found.temporary_bytes <= budget
        assert 1 <= found.chunk_size <= outputs


def test_a_dynamic_batch_stays_symbolic_and_is_planned_for_its_hint():
    s0 = sympy.Symbol("s0", integer=True, positive=True)
    dynamic = shape(2 * s0, positives=10 * s0, hints={s0: 64})
    assert made(dynamic, None, LIMITS) == made(shape(), None, LIMITS)
    rows = sympy.Symbol("N")
    assert rows in made(dynamic).memory.temporaries.free_symbols


def test_what_is_not_known_of_a_device():
    assert limits_for("cpu").cache_bytes == cpu_cache_bytes() >= MIB // 4
    assert limits_for("cuda").min_chunk == 4096
    with pytest.raises(OptionError, match=r"'tpu'.*'cpu', 'cuda'"):
        limits_for("tpu")


def test_kernel_sizes(monkeypatch, tmp_path):
    assert [_kernel_size(t) for t in ("32768K\n", "2M", "1G", "17")] == [
        32 << 20,
        2 << 20,
        1 << 30,
        17,
    ]
    monkeypatch.setattr(Path, "glob", lambda *_: iter([tmp_path / "index0"]))
    cpu_cache_bytes.cache_clear()
    assert cpu_cache_bytes() == 32 * MIB
    cpu_cache_bytes.cache_clear()


def test_default_compute_dtype():
    assert planner.default_compute_dtype(FP8, "cpu") is torch.bfloat16
    assert planner.default_compute_dtype(torch.float16, "cpu") is torch.float32
    assert planner.default_compute_dtype(torch.float16, "cuda") is torch.float16
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert planner.default_compute_dtype(dtype, "cpu") is dtype


def at_once(rows=2048, outputs=131_072, **changes):
    """Cross entropy with a weight gradient, which the forward may form."""
    return shape(rows, outputs, loss=CE, fused_update=False, at_once=True, **changes)


def test_row_blocks_save_a_product():
    found = made(at_once(), None, LIMITS)
    assert found.at_once
    assert found.products == 3
    assert found.row_block == 256
    assert found.temporary_bytes < 100 * MIB
    assert found.saves
    assert found.traffic.read_bytes == (2 * 8 + 7) * 2 * 131_072 * 768
    assert found.traffic.written_bytes == 8 * 2 * 131_072 * 768


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"rows": 256}, {}),  # a block of a quarter is too few rows
        ({"rows": 2048, "outputs": 10_000_000}, {"memory_budget": "200MiB"}),
        ({"rows": 1 << 14}, {"memory_budget": "300MiB"}),  # a bf16 dw of 16 roundings
        ({}, {"chunk_size": 4096}),
        ({"at_once": False}, {}),
        ({"fused_update": True}, {}),
        ({"device": "cuda", "compute_dtype": torch.float32}, {}),
    ],
)
def test_no_row_blocks(changes, options):
    found = made(dataclasses.replace(at_once(), **changes), Options(**options), LIMITS)
    assert found.row_block == 0
    assert not found.at_once
    assert found.products == 4


def test_row_blocks_on_cuda_hold_little_else():
    found = made(at_once(8192, 128_256, features=4096, device="cuda"))
    assert (found.row_block, found.products) == (1024, 3)
    logits, features = 2 * 1024 * 128_256, 4096 * 4
    assert logits < found.temporary_bytes < logits + (8192 + 1024) * features + MIB


def test_many_rows_get_blocks_that_round_a_bf16_gradient_seldom():
    found = made(at_once(1 << 14), None, LIMITS)
    assert found.row_block == (1 << 14) // 8
    assert found.saves
    wide = made(at_once(1 << 14, dtype=torch.float32), None, LIMITS)
    assert wide.row_block == 128


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8192),
    outputs=st.integers(1, 10**6),
    budget=st.integers(1 << 20, 1 << 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, FP8]),
)
def test_row_blocks_within_the_budget(rows, outputs, budget, dtype):
    found = plan(at_once(rows, outputs, dtype=dtype), Options(memory_budget=budget), LIMITS)
    if isinstance(found, Plan) and found.row_block:
        assert found.temporary_bytes <= budget
        assert min(rows, 128) <= found.row_block <= rows
        assert 1 <= found.chunk_size <= outputs


def test_a_budget_for_all_logits_holds_them_all():
    found = made(at_once(), Options(memory_budget="1GiB"), LIMITS)
    assert found.row_block == 2048
    assert found.traffic.read_bytes == 2 * 2 * 131_072 * 768


def test_binary_cross_entropy_needs_no_blocks():
    found = made(shape(fused_update=False, at_once=True), None, LIMITS)
    assert (found.at_once, found.row_block, found.products) == (True, 0, 3)
    frozen = made(shape(fused_update=False, at_once=True, weight_trainable=False))
    assert frozen.products == 2
    nothing = {"weight_trainable": False, "features_trainable": False}
    assert not made(shape(fused_update=False, at_once=True, **nothing)).at_once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_a_budget_for_all_logits_saves_a_fused_update_a_product(dtype):
    head = shape(2048, 131_072, dtype, loss=CE)
    assert not made(head, None, LIMITS).holds_logits
    assert not made(head, Options(memory_budget="100MiB"), LIMITS).holds_logits
    found = made(head, Options(memory_budget="2GiB"), LIMITS)
    assert found.holds_logits
    assert found.products == 3
    assert found.traffic.read_bytes == 2 * dtype.itemsize * 131_072 * 768
    assert found.memory.logits.bytes < found.temporary_bytes < 2 << 30
    chunk = Options(memory_budget="2GiB", chunk_size=999)
    assert (made(head, chunk, LIMITS).chunk_size, made(head, chunk).holds_logits) == (999, True)
    for other in ({"loss": BCE}, {"device": "cuda"}):
        changed = shape(2048, 131_072, dtype, **{"loss": CE, **other})
        assert not made(changed, Options(memory_budget="4GiB"), LIMITS).holds_logits


def test_a_cpu_chunk_is_larger_than_the_cache_share_where_the_logits_are_huge():
    small, large = (made(shape(outputs=L), None, LIMITS) for L in (50_000, 670_091))
    assert small.chunk_size * (128 + 2 * 768) * 2 <= LIMITS.working_set + LIMITS.multiple * 2000
    assert large.chunk_size > 2 * small.chunk_size
    assert large.saves
    many = shape(2048, 670_091, loss=CE)
    assert made(many, None, LIMITS).chunk_size == choose.ENOUGH_LOGITS // 2048


def test_decoded_chunks_stay_small_unless_products_last():
    few, many = (shape(rows, 670_091, torch.float8_e4m3fn) for rows in (128, 1024))
    chunk = made(few, None, LIMITS).chunk_size
    assert choose.ENOUGH_DECODED // 2 < chunk * 768 <= choose.ENOUGH_DECODED
    assert made(many, None, LIMITS).chunk_size > 2 * chunk
