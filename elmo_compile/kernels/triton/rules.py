"""The updates on float32 tiles, as numerics/update.py has them in torch, and their stores.

A tile is of any shape; random words come in, stored values go out. Nothing here reads a tensor.
"""

import triton
import triton.language as tl

from elmo_compile.kernels.triton.storage import (
    rounded,
    to_bf16_stochastic,
    to_e5m2_stochastic,
    widen,
    widen_e5m2,
)


@triton.jit
def _decayed(step, w, weight_decay, DECAY: tl.constexpr):
    """0 times an infinite weight would be NaN."""
    return step + weight_decay * w if DECAY else step


@triton.jit
def direction(
    w, grad, m, v, a, lr, weight_decay, beta1, beta2, rest1, rest2, eps,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """(u, m, v) of one update; a: Adagrad's sum, which holds this gradient already.

    rest1, rest2: 1 - beta1 and 1 - beta2, formed in float64. DECAY: whether the weight enters.
    """
    if RULE == "adamw":
        m = beta1 * m + rest1 * grad
        v = beta2 * v + rest2 * grad * grad
        u = -lr * _decayed(tl.div_rn(m, tl.sqrt_rn(v) + eps), w, weight_decay, DECAY)
    elif RULE == "lion":
        d = beta1 * m + rest1 * grad
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        sign = tl.where(d == d, sign, d)
        m = beta2 * m + rest2 * grad
        u = -lr * _decayed(sign, w, weight_decay, DECAY)
    elif RULE == "adagrad":
        u = -lr * _decayed(tl.div_rn(grad, tl.sqrt_rn(a) + eps), w, weight_decay, DECAY)
    else:
        step = _decayed(grad, w, weight_decay, DECAY)
        if MOMENTUM:
            m = beta1 * m + step
            step = step + beta1 * m if NESTEROV else m
        u = -lr * step
    return u, m, v


@triton.jit
def compensate(w, s, stored, LARGEST: tl.constexpr, HALF: tl.constexpr):
    """What rounding `w + s` to `stored` (float32) lost; at most HALF where that saturated."""
    c = s + (w - stored)
    clamped = tl.where(c > HALF, HALF, tl.where(c < -HALF, -HALF, c))
    return tl.where(tl.abs(stored) >= LARGEST, clamped, c)


@triton.jit
def with_error(m, v, error, lost, eps, RULE: tl.constexpr):
    """ECO: the first moment with what the rounding of the weight lost."""
    if RULE == "adamw":
        return m + error * lost * (tl.sqrt_rn(v) + eps)
    else:
        return m + error * lost


@triton.jit
def stored_state(v, word, TYPE: tl.constexpr):
    """A moment in its storage type: bf16 stochastically."""
    return rounded(v, word, TYPE, True)


@triton.jit
def stored_compensation(c, word, E5M2: tl.constexpr):
    """A compensation as stored: E5M2 bytes or bf16, stochastically."""
    return to_e5m2_stochastic(c, word) if E5M2 else to_bf16_stochastic(c, word)


@triton.jit
def loaded_compensation(c, E5M2: tl.constexpr):
    """A stored compensation as float32."""
    return widen_e5m2(c) if E5M2 else widen(c)
