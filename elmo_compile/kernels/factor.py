"""A small matrix with the Gram matrix of the features, for norms of gradients that do not exist.

`||g^T x||_F^2 = ||g^T y||_F^2` wherever `y y^T = x x^T`: with N rows and more than 2 N features, y
is the N x N factor of a QR decomposition. It is the identity `sum((g g^T) * (x x^T))` of
ALGORITHMS.md section 3 as a sum of squares, which cannot cancel. Where all rows nearly agree, most
of y is in a few columns, and sums over rows cancel there: these columns are kept in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 8
"""Columns of y whose products are formed in float64."""
_SLICE_BYTES = 64 << 20
"""Of the float64 copy of some rows of g, and of their products."""
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""bfloat16 tensors that add up to one of a dtype: each holds 8 bits of it."""


class GramFactor:
    """y of some features x [N, D], and `g^T y` a chunk at a time."""

    def __init__(self, x_ND: Tensor, *, reduce: bool = True) -> None:
        """reduce: False: y is x, however wide that is."""
        rows, features = x_ND.shape
        y_NK = x_ND.double()
        if reduce and 2 * rows <= features:
            y_NK = torch.linalg.qr(y_NK.t(), mode="r").R.t()
        order = torch.argsort(torch.linalg.vector_norm(y_NK, dim=0), descending=True)
        self._large_NK = y_NK[:, order[:_LARGE]]
        rest_NK = y_NK[:, order[_LARGE:]]
        self._rest_NK = rest_NK.contiguous() if x_ND.dtype == torch.float64 else rest_NK.float()
        in_parts = x_ND.is_cuda and self._rest_NK.dtype == torch.float32
        self._parts_NK = bfloat16_parts(self._rest_NK, 3) if in_parts else None
        self._slice = max(1, _SLICE_BYTES // (8 * max(1, *y_NK.shape)))

    def row_squares(self, g_CN: Tensor) -> Tensor:
        """float64 [C]: the sum of the squares of each row of `g x`."""
        return torch.cat([self._row_squares(part) for part in torch.split(g_CN, self._slice)])

    def _row_squares(self, g_CN: Tensor) -> Tensor:
        large_C = torch.mm(g_CN.double(), self._large_NK).square().sum(1)
        if self._parts_NK is None:
            rest_CK = torch.mm(g_CN.to(self._rest_NK.dtype), self._rest_NK)
        else:
            rest_CK = product_of_parts(bfloat16_parts(g_CN, _PARTS[g_CN.dtype]), self._parts_NK)
        return large_C + rest_CK.square_().sum(1, dtype=torch.float64)


def bfloat16_parts(t: Tensor, count: int) -> list[Tensor]:
    """bfloat16 tensors, the largest first, whose sum is `t`, or has 8 `count` bits of it."""
    parts, rest = [t.bfloat16()], t.float()
    for _ in range(1, count):
        rest = rest - parts[-1].float()
        parts.append(rest.bfloat16())
    return parts


def product_of_parts(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """float32 `a b` of matrices in parts, as exact as a float32 product.

    On CUDA a float32 product is what `torch.backends.cuda.matmul.fp32_precision` says for the whole
    process; that of bfloat16 matrices is exact but for float32 sums.
    """
    pairs = [(i, k) for i in range(len(a)) for k in range(len(b)) if i + k < len(b)]
    pairs.sort(key=sum, reverse=True)  # What is smallest first.
    total = _product(a[pairs[0][0]], b[pairs[0][1]])
    for i, k in pairs[1:]:
        total += _product(a[i], b[k])
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
