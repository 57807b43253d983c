"""Norms of gradients that do not exist: products as exact as float32's, a few rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elmo_compile.kernels import factor
from elmo_compile.testing.budget import assert_within_budget

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Values of many magnitudes, float32."""
    make = torch.Generator().manual_seed(seed)
    scale = torch.randn(rows, columns, generator=make).mul(3).exp()
    return torch.randn(rows, columns, generator=make) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(101, 7, 33), (64, 300, 5), (1, 1, 1)], ids=str)
def test_parts_multiply_as_float32_does(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    C, N, K = shape
    g_CN, y_NK = matrix(C, N, 0).clamp(-1e4, 1e4).to(dtype), matrix(N, K, 1)
    g_parts = factor.bfloat16_parts(g_CN, factor._PARTS[dtype])
    y_parts = factor.bfloat16_parts(y_NK, 3)
    assert torch.equal(torch.stack(y_parts).double().sum(0), y_NK.double())
    assert torch.equal(torch.stack(g_parts).double().sum(0), g_CN.double())
    assert_within_budget(
        factor.product_of_parts(g_parts, y_parts),
        g_CN.double() @ y_NK.double(),
        g_CN.float() @ y_NK,
        what="product",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("features", [9, 40])
def test_row_squares_of_slices(
    dtype: torch.dtype, in_parts: bool, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that nearly agree included, whose sums cancel."""
    x_ND = 1000 + matrix(12, features, 2).clamp(-5, 5)
    g_CN = (matrix(50, 12, 3).clamp(-5, 5) / 100).to(dtype)
    monkeypatch.setattr(factor, "_SLICE_BYTES", 7 * 8 * 40)
    found = factor.GramFactor(x_ND)
    assert 1 < found._slice < 50
    if in_parts:  # as on a GPU
        found._parts_NK = factor.bfloat16_parts(found._rest_NK, 3)
    truth = (g_CN.double() @ x_ND.double()).square().sum(1)
    torch.testing.assert_close(found.row_squares(g_CN), truth, rtol=1e-5, atol=0)
