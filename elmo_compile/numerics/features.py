"""Features in E4M3, for products of fp8 with fp8.

Each row has one scale, a power of two: the smallest by which its largest magnitude stays within
E4M3's 448. So a rounded row is held exactly by bf16, rounding it again changes nothing, and a
product of codes, scaled, is the product of the rounded rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_LARGEST_MANTISSA, _LARGEST_EXPONENT = 0.875, 9
"""448 = 0.875 * 2^9."""
_EXPONENTS = (-100, 118)
"""Of a scale: within, neither it nor its inverse leaves float32, nor the smallest code bf16."""


def to_codes(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to E4M3, to nearest, ties to even.

    Args:
        x_ND: floating point [N, D].

    Returns:
        Codes float8_e4m3fn [N, D] and scales float32 [N], powers of two: x = codes * scale. A row
        that holds NaN or infinity has NaN for codes.
    """
    v_ND = x_ND.to(torch.float32)
    top_N = v_ND.abs().amax(1) if x_ND.shape[1] else v_ND.new_zeros(x_ND.shape[0])
    finite_N = torch.isfinite(top_N)
    mantissa_N, exponent_N = torch.frexp(torch.where(finite_N, top_N, 1.0))
    exponent_N = exponent_N - _LARGEST_EXPONENT + (mantissa_N > _LARGEST_MANTISSA).to(torch.int32)
    exponent_N = exponent_N.clamp(*_EXPONENTS)
    scaled_ND = v_ND * _power_of_two(-exponent_N)[:, None]
    codes_ND = torch.where(finite_N[:, None], scaled_ND, torch.nan).to(FP8)
    return codes_ND, _power_of_two(exponent_N)


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32 `2^exponent` for int32 in [-126, 127], by its bits: `ldexp` takes a power, which need
    not be exact on every device."""
    return ((exponent + 127) << 23).view(torch.float32)


def round_features(x_ND: Tensor) -> Tensor:
    """The rows that `to_codes` stands for, bfloat16 [N, D]; what `compute_dtype=float8_e4m3fn`
    computes with. `round_features(round_features(x)) == round_features(x)`."""
    codes_ND, scale_N = to_codes(x_ND)
    return (codes_ND.to(torch.float32) * scale_N[:, None]).to(torch.bfloat16)
