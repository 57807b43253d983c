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

    def row_squares(self, g_CN: Tensor) -> Tensor:
        """float64 [C]: the sum of the squares of each row of `g x`. Products are not in TF32."""
        settings = torch.backends.cuda.matmul
        before = settings.fp32_precision
        settings.fp32_precision = "ieee"
        try:
            large_C = torch.mm(g_CN.double(), self._large_NK).square().sum(1)
            rest_CK = torch.mm(g_CN.to(self._rest_NK.dtype), self._rest_NK)
        finally:
            settings.fp32_precision = before
        return large_C + rest_CK.square_().sum(1, dtype=torch.float64)
