"""Between a value in float32 registers and its stored form, bit for bit numerics/rounding.py.

fp8 (E4M3) tensors are passed as bytes: sm_80 has no such type, and the rounding leaves the byte.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether these kernels run in the interpreter: its casts truncate and its bf16 products are wrong,
so there bf16 goes through integer arithmetic and products through float32."""

_INF = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_BF16_MAX = tl.constexpr(0x7F7F0000)
_E4M3_MAX = tl.constexpr(0x43E00000)
_E4M3_MIN_NORMAL = tl.constexpr(0x3C800000)
_E5M2_MAX = tl.constexpr(0x47600000)
_E5M2_MIN_NORMAL = tl.constexpr(0x38800000)


@triton.jit
def _e4m3_to_float(v):
    """E4M3 bytes as float32, by the bits: exponent and mantissa in place, then times 2^120."""
    byte = v.to(tl.uint32)
    magnitude = byte & 0x7F
    scaled = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    bits = scaled.to(tl.uint32, bitcast=True) | ((byte & 0x80) << 24)
    bits = tl.where(magnitude == 0x7F, _NAN, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(v):
    """Stored values (any float type, E4M3 as bytes, integers as targets) as float32, exactly."""
    if v.dtype == tl.uint8:
        if INTERPRETED:
            return _e4m3_to_float(v)
        elif tl.target_info.cuda_capability_geq(8, 9):
            return v.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            return _e4m3_to_float(v)
    elif INTERPRETED and v.dtype == tl.bfloat16:
        bits = v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return v.to(tl.float32)


@triton.jit
def operand(v, COMPUTE: tl.constexpr):
    """Stored values as an operand of a product in the compute type.

    In the interpreter a bf16 operand is float32 holding values of bf16.
    """
    if INTERPRETED and tl.bfloat16 == COMPUTE:
        exact = v.dtype == tl.bfloat16 or v.dtype == tl.uint8
        return widen(v) if exact else widen(to_bf16_nearest(widen(v)))
    elif v.dtype == COMPUTE:
        return v
    elif v.dtype == tl.uint8 and not INTERPRETED:
        if tl.target_info.cuda_capability_geq(8, 9):
            return v.to(tl.float8e4nv, bitcast=True).to(COMPUTE)
        else:
            return _e4m3_to_float(v).to(COMPUTE)
    else:
        return widen(v).to(COMPUTE)


@triton.jit
def narrow(v, COMPUTE: tl.constexpr):
    """float32 to the compute type, to nearest."""
    if INTERPRETED and tl.bfloat16 == COMPUTE:
        return to_bf16_nearest(v)
    else:
        return v.to(COMPUTE)


@triton.jit
def _magnitude(v):
    """Bits of |v| and the sign bit, of float32."""
    bits = v.to(tl.uint32, bitcast=True)
    return bits & 0x7FFFFFFF, bits & 0x80000000


@triton.jit
def _finish_bf16(q, magnitude, sign):
    """The bf16 of rounded bits q, with infinities kept and the canonical NaN."""
    q = tl.where(magnitude == _INF, _INF, q) | sign
    q = tl.where(magnitude > _INF, _NAN, q)
    return (q >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bf16_stochastic(v, word):
    """Round float32 to bf16 stochastically with the low 16 bits of a random word."""
    magnitude, sign = _magnitude(v)
    a = tl.minimum(magnitude, _BF16_MAX)
    return _finish_bf16(a + (word & 0xFFFF), magnitude, sign)


@triton.jit
def to_bf16_nearest(v):
    """Round float32 to bf16, ties to even, finite overflow to the largest."""
    magnitude, sign = _magnitude(v)
    a = tl.minimum(magnitude, _BF16_MAX)
    return _finish_bf16(a + 0x7FFF + ((a >> 16) & 1), magnitude, sign)


@triton.jit
def to_e4m3_stochastic(v, word):
    """Round float32 to E4M3 bytes stochastically with the low 20 bits of a random word.

    Below 2^-6 the step is constant, so 2^-6 is added first; the byte is then the distance of the
    rounded bits from those of 2^-6, with or without the exponent's step.
    """
    magnitude, sign = _magnitude(v)
    a = tl.minimum(magnitude, _E4M3_MAX)
    small = a < _E4M3_MIN_NORMAL
    shifted = (a.to(tl.float32, bitcast=True) + 0.015625).to(tl.uint32, bitcast=True)
    q = (tl.where(small, shifted, a) + (word & 0xFFFFF)) >> 20
    byte = q - tl.where(small, 968, 960).to(tl.uint32)
    byte = tl.where(magnitude > _INF, 0x7F, byte | (sign >> 24))
    return byte.to(tl.uint8)


@triton.jit
def to_e4m3_nearest(v):
    """Round float32 to E4M3 bytes, ties to even, saturating.

    Below 2^-6, adding 2^14 leaves float32 the step 2^-9: the addition itself rounds, once.
    """
    magnitude, sign = _magnitude(v)
    a = tl.minimum(magnitude, _E4M3_MAX)
    small = (a.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - 960
    byte = tl.where(a < _E4M3_MIN_NORMAL, small, normal)
    byte = tl.where(magnitude > _INF, 0x7F, byte | (sign >> 24))
    return byte.to(tl.uint8)


@triton.jit
def to_e5m2_stochastic(v, word):
    """Round float32 to E5M2 bytes stochastically with the low 21 bits of a random word.

    As `to_e4m3_stochastic`, with subnormals below 2^-14.
    """
    magnitude, sign = _magnitude(v)
    a = tl.minimum(magnitude, _E5M2_MAX)
    small = a < _E5M2_MIN_NORMAL
    shifted = (a.to(tl.float32, bitcast=True) + 6.103515625e-05).to(tl.uint32, bitcast=True)
    q = (tl.where(small, shifted, a) + (word & 0x1FFFFF)) >> 21
    byte = q - tl.where(small, 452, 448).to(tl.uint32)
    byte = tl.where(magnitude > _INF, 0x7F, byte | (sign >> 24))
    return byte.to(tl.uint8)


@triton.jit
def widen_e5m2(v):
    """E5M2 bytes as float32: an E5M2 number is the upper half of a float16 one."""
    return (v.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def rounded(v, word, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 values in a storage type (E4M3 as bytes): one rounding, by `word` if STOCHASTIC."""
    if tl.uint8 == TYPE:
        return to_e4m3_stochastic(v, word) if STOCHASTIC else to_e4m3_nearest(v)
    elif tl.bfloat16 == TYPE:
        return to_bf16_stochastic(v, word) if STOCHASTIC else to_bf16_nearest(v)
    else:
        return v.to(TYPE)
