"""Streaming top-k: values, order, ties by lower index, whatever the chunk."""

from __future__ import annotations

import pytest
import torch

from elmo_compile.errors import InputError
from elmo_compile.kernels import aten


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("chunk", [1, 7, 50, 51, 500])
def test_ties_go_to_the_lower_index(chunk: int, weight: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (6, 4)).float()
    w = torch.randint(-2, 3, (51, 4)).float()
    b = torch.randint(-1, 2, (51,)).float()
    compute = torch.float32 if weight == torch.float32 else torch.bfloat16
    for bias in (None, b):
        values, indices = aten.topk(x, w.to(weight), bias, 9, chunk, compute)
        z = x @ w.t() if bias is None else x @ w.t() + bias
        expected = z.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :9])
        assert torch.equal(indices, expected.indices[:, :9])


def test_signed_zeros_and_infinities() -> None:
    w = torch.tensor([[-0.0], [0.0], [-torch.inf], [torch.inf], [-1.0], [-2.0]])
    values, indices = aten.topk(torch.ones(1, 1), w, None, 6, 2, torch.float32)
    assert indices.tolist() == [[3, 0, 1, 4, 5, 2]]
    assert values.tolist() == [[torch.inf, 0.0, 0.0, -1.0, -2.0, -torch.inf]]


def test_k_out_of_range() -> None:
    with pytest.raises(InputError, match=r"k=9.*1 <= k <= 8"):
        aten.topk(torch.ones(1, 4), torch.ones(8, 4), None, 9, 2, torch.float32)
