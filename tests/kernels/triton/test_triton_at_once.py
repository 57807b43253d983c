"""Loss and gradients in one pass on the Triton family, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from elmo_compile.kernels import triton as family
from elmo_compile.kernels.triton import row_blocks as module
from elmo_compile.testing.budget import assert_within_budget
from kernels.head_cases import FP8, exact, in_torch
from kernels.triton.cases import PRECISIONS, make, moved, scale_of

ODD = {"num_rows": 19, "num_features": 45, "num_outputs": 5001, "chunk": 1100}


def check(p, device, rows) -> None:
    scale_N = scale_of(p)
    truth, same = in_torch(exact(p), scale_N), in_torch(p, scale_N)
    q = moved(p, device)
    got = family.loss_and_gradients(q, scale_N.to(device), rows)
    stored = torch.float32 if p.w_LD.dtype == FP8 or p.wide_dw else p.w_LD.dtype
    assert got.dw_LD.dtype == stored
    # A few rows, whose products torch may happen to add in a better order.
    assert_within_budget(got.rows_N.cpu(), truth.rows_N, same.rows_N, what="rows", ulps=16)
    assert_within_budget(got.dx_ND.cpu(), truth.dx_ND, same.dx_ND, what="dx", ulps=16)
    same_dw = same.dw_LD.to(stored)
    assert_within_budget(got.dw_LD.cpu(), truth.dw_LD, same_dw, what="dw", ulps=4)
    if truth.db_L is not None:
        assert_within_budget(got.db_L.cpu(), truth.db_L, same.db_L, what="db")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [4, 19, 100])
def test_row_blocks(precision, rows, device):
    for wide in (False, True):
        p = dataclasses.replace(make("ce", precision, **ODD, bias=rows != 19), wide_dw=wide)
        assert module.fits_row_blocks(p, rows, True)
        check(p, device, rows)


@pytest.mark.parametrize(
    ("kind", "precision", "rows"),
    [("bce", "bf16", 0), ("ce", "fp8", 8), ("ce", "bf16", 0), ("ce_dense", "fp32", 8)],
)
def test_without_blocks(kind, precision, rows, device):
    sizes = {"num_rows": 9, "num_features": 20, "num_outputs": 101, "chunk": 40}
    check(make(kind, precision, **sizes), device, rows)


def test_what_is_not_needed_is_not_made(device):
    p = moved(make("ce", "fp32", num_rows=10), device)
    flags = {"need_dx": False, "need_dw": False, "need_db": False}
    for need in flags:
        made = family.loss_and_gradients(
            p, torch.ones(10, device=device), 4, **{**flags, need: True}
        )
        found = dict(zip(flags, made[:3]))
        assert [name for name, value in found.items() if value is not None] == [need]
        assert made.rows_N is not None


def test_ignored_rows_and_classes_out_of_range(device):
    p = moved(make("ce", "fp32", num_rows=6), device)
    p.target[:] = torch.tensor([-100, 0, 52, 53, -1, -100])
    made = family.loss_and_gradients(p, torch.ones(6, device=device), 4)
    assert made.rows_N.isnan().tolist() == [False, False, False, True, True, False]
    assert made.rows_N[[0, 5]].tolist() == [0, 0]
    assert not made.dx_ND[[0, 5]].any()


def test_a_large_common_offset_and_masked_outputs(device):
    p = make("ce", "fp32", num_rows=6)
    p.b_L[:] = 1e4
    p.b_L[::3] = -1e30
    p.target[p.target >= 0] = 1
    check(p, device, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [n for n in PRECISIONS if n in ("fp32", "bf16")])
def test_full_size(precision, device):
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    sizes = {"num_rows": 700, "num_features": 264, "num_outputs": 30_001, "chunk": 11_000}
    check(make("ce", precision, **sizes), device, 256)
