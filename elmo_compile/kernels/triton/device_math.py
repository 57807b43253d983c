"""Element-wise arithmetic of the losses on float32 tiles, as numerics/losses.py has it in torch.

Nothing here calls a language function that is itself `@triton.jit` (tl.sum, tl.zeros, tl.cdiv):
those fix interpreter or compiler when Triton is first imported, the code below when it is.
"""

import triton
import triton.language as tl

from elmo_compile.kernels.triton.storage import INTERPRETED


@triton.jit
def tile_sum(v, AXIS: tl.constexpr):
    """Sum over one axis."""
    return tl.reduce(v, AXIS, tl.standard._sum_combine)


@triton.jit
def tile_max(v, AXIS: tl.constexpr):
    """Maximum over one axis; a NaN is passed over, as the sum that follows will show it."""
    return tl.reduce(v, AXIS, tl.standard._elementwise_max)


@triton.jit
def ceil_div(a, b):
    return (a + b - 1) // b


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(v):
    """`e^v`; results below 2^-126 are 0. In instructions: a multiplication and the exponential of
    the special function unit, where `tl.exp` adds four for subnormal results."""
    return tl.exp2(v * _LOG2_E)


@triton.jit
def reciprocal(v):
    """`1 / v` with relative error 2^-23, 0 from 2^126 on. A division would take eight instructions
    instead of one, for operands beyond those that come here."""
    if INTERPRETED:
        return 1.0 / v
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log1p_unit(e):
    """`log(1 + e)` for e in [0, 1], relative error below 3e-7.

    `2 atanh(e / (2 + e))` as an odd series: the hardware logarithm is only absolutely accurate
    near 1, where a confident negative's loss lives.
    """
    s = e * reciprocal(2.0 + e)
    q = s * s
    p = q * (1.0 / 15.0) + (1.0 / 13.0)
    p = p * q + (1.0 / 11.0)
    p = p * q + (1.0 / 9.0)
    p = p * q + (1.0 / 7.0)
    p = p * q + (1.0 / 5.0)
    p = p * q + (1.0 / 3.0)
    return 2.0 * (s + s * q * p)


@triton.jit
def expm1_nonpositive(t):
    """`exp(t) - 1` for t <= 0 (or barely above), without cancellation near 0."""
    p = t * (1.0 / 40320.0) + (1.0 / 5040.0)
    p = p * t + (1.0 / 720.0)
    p = p * t + (1.0 / 120.0)
    p = p * t + (1.0 / 24.0)
    p = p * t + (1.0 / 6.0)
    p = p * t + 0.5
    series = t + t * t * p
    return tl.where(t > -0.5, series, exp(t) - 1.0)


@triton.jit
def sigmoid(z):
    """`1 / (1 + exp(-z))`, relatively accurate for z of either sign: 0 only below z = -87."""
    return reciprocal(1.0 + exp(-z))


@triton.jit
def bce_gradient(z, y):
    """`sigmoid(z) - y` as `(1 - y) sigmoid(z) - y sigmoid(-z)`, which does not cancel at y = 1."""
    return (1.0 - y) * sigmoid(z) - y * sigmoid(-z)


@triton.jit
def softplus(z):
    """`log(1 + exp(z))`, the value of a negative."""
    return tl.where(z < 0, 0.0, z) + log1p_unit(exp(-tl.abs(z)))


@triton.jit
def bce_value(z, y):
    """`max(z, 0) - z y + log(1 + exp(-|z|))`."""
    return tl.where(z < 0, 0.0, z) - z * y + log1p_unit(exp(-tl.abs(z)))
