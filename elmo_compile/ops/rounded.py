"""`elmo::rounded`: values as a narrower dtype would hold them, which no compiler leaves out.

Programs compute in float32 what the user's program had in bfloat16 or float16. Where such values
are compared, the rounding decides: of two that were equal, neither may be the larger.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op(
    "elmo::rounded", mutates_args=(), schema="(Tensor x, ScalarType dtype) -> Tensor"
)
def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, rounded to nearest in `dtype` (no wider than that of `x`), in the dtype of `x`."""
    return x.to(dtype, copy=True).to(x.dtype)


@rounded.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x)


_MAGNITUDE, _SIGN = 0x7FFFFFFF, -0x80000000
_INFINITY, _LARGEST_HALF, _LEAST_NORMAL_HALF = 0x7F800000, 0x477FE000, 0x38800000
"""As bits of float32: infinity, 65504 and 2^-14."""


def round_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in operations that compile, on bits: Inductor leaves out a cast and its way back.

    bfloat16 drops 16 bits of the significand of float32, float16 drops 13, and has steps of 2^-24
    below 2^-14: the sum with 0.5 has that as its last bit. float64 is cast to float32 first.
    """
    v = x.float()
    bits = v.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    n = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}[dtype]
    q = (magnitude + ((1 << (n - 1)) - 1) + ((magnitude >> n) & 1)) & -(1 << n) if n else magnitude
    if dtype == torch.float16:
        small = ((v.abs() + 0.5) - 0.5).view(torch.int32)
        q = torch.where(magnitude < _LEAST_NORMAL_HALF, small, q)
        q = torch.where(q > _LARGEST_HALF, _INFINITY, q)
    return torch.where(v != v, v, (q | (bits & _SIGN)).view(torch.float32)).to(x.dtype)
