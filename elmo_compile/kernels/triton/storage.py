"""Between a value in float32 registers and its stored form, bit for bit numerics/rounding.py.

fp8 (E4M3) tensors are passed as bytes: sm_80 has no such type, and the rounding leaves the byte.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether these kernels run in the interpreter: its casts truncate and its bf16 products are wrong,
so there bf16 goes through integer arithmetic and products through float32."""

_NAN = tl.constexpr(0x7FC00000)
_SIGN = tl.constexpr(0x80000000)
_BF16_LARGEST = tl.constexpr(3.3895313892515355e38)


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
    elif INTERPRETED and tl.float8e4nv == COMPUTE:
        return widen(v)
    elif v.dtype == COMPUTE:
        return v
    elif tl.float8e4nv == COMPUTE:
        return v.to(tl.float8e4nv, bitcast=True)
    else:
        # E4M3 too: by way of float16 the compiler takes the conversion unit, at a quarter the rate.
        return widen(v).to(COMPUTE)


@triton.jit
def narrow(v, COMPUTE: tl.constexpr):
    """float32 to the compute type, to nearest."""
    if INTERPRETED and tl.bfloat16 == COMPUTE:
        return to_bf16_nearest(v)
    else:
        return v.to(COMPUTE)


@triton.jit
def _upper_half(bits, v):
    """The bf16 in the upper half of bits; the canonical NaN where v is one."""
    bits = tl.where(v == v, bits, _NAN)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bf16_stochastic(v, word):
    """Round float32 to bf16 stochastically with the low 16 bits of a random word.

    A sign is no obstacle to adding to the magnitude. From the largest bf16 on (infinities too)
    nothing is added, and cutting rounds down to it.
    """
    bits = v.to(tl.uint32, bitcast=True)
    return _upper_half(bits + tl.where(tl.abs(v) < _BF16_LARGEST, word & 0xFFFF, 0), v)


@triton.jit
def to_bf16_nearest(v):
    """Round float32 to bf16, ties to even, finite overflow to the largest."""
    bits = v.to(tl.uint32, bitcast=True)
    half = 0x7FFF + ((bits >> 16) & 1)
    return _upper_half(bits + tl.where(tl.abs(v) < _BF16_LARGEST, half, 0), v)


@triton.jit
def _fp8_stochastic(v, word, MIN_NORMAL: tl.constexpr, RANDOM: tl.constexpr):
    """(bits of |v| plus what was added, rounded by `word & RANDOM`; what was added).

    Subnormals have a constant step: so has float32 above MIN_NORMAL, which is added to them.
    """
    added = tl.where(tl.abs(v) < MIN_NORMAL, MIN_NORMAL, 0.0)
    bits = (tl.abs(v) + added).to(tl.uint32, bitcast=True)
    return bits + (word & RANDOM), added


@triton.jit
def _on_grid(bits, added, v, RANDOM: tl.constexpr):
    """float32 on the format's grid, or beyond its end, with v's sign; NaN where v is one."""
    q = (bits & (0xFFFFFFFF ^ RANDOM)).to(tl.float32, bitcast=True) - added
    signed = q.to(tl.uint32, bitcast=True) | (v.to(tl.uint32, bitcast=True) & _SIGN)
    return tl.where(v == v, signed.to(tl.float32, bitcast=True), v)


@triton.jit
def _signed_byte(byte, v):
    """The byte of a magnitude with v's sign; the canonical NaN where v is one."""
    byte |= (v.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return tl.where(v == v, byte, 0x7F).to(tl.uint8)


@triton.jit
def to_e4m3_stochastic(v, word):
    """Round float32 to E4M3 bytes stochastically with the low 20 bits of a random word.

    The chip's conversion is exact here, but for saturating. Without it: the byte is the distance
    of the bits from those of 2^-6, with or without the exponent's step.
    """
    bits, added = _fp8_stochastic(v, word, 0.015625, 0xFFFFF)
    if not INTERPRETED and tl.target_info.cuda_capability_geq(8, 9):
        return _on_grid(bits, added, v, 0xFFFFF).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        byte = (bits >> 20) - tl.where(added > 0, 968, 960).to(tl.uint32)
        return _signed_byte(tl.minimum(byte, 0x7E), v)


@triton.jit
def to_e4m3_nearest(v):
    """Round float32 to E4M3 bytes, ties to even, saturating.

    Without the chip's conversion: below 2^-6, adding 2^14 leaves float32 the step 2^-9, so the
    addition itself rounds, once.
    """
    if not INTERPRETED and tl.target_info.cuda_capability_geq(8, 9):
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        a = tl.abs(v)
        bits = a.to(tl.uint32, bitcast=True)
        small = (a + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        return _signed_byte(tl.where(a < 0.015625, small, tl.minimum(normal, 0x7E)), v)


@triton.jit
def to_e5m2_stochastic(v, word):
    """Round float32 to E5M2 bytes stochastically with the low 21 bits of a random word.

    As `to_e4m3_stochastic`, with subnormals below 2^-14.
    """
    bits, added = _fp8_stochastic(v, word, 6.103515625e-05, 0x1FFFFF)
    if not INTERPRETED and tl.target_info.cuda_capability_geq(8, 9):
        return _on_grid(bits, added, v, 0x1FFFFF).to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        byte = (bits >> 21) - tl.where(added > 0, 452, 448).to(tl.uint32)
        return _signed_byte(tl.minimum(byte, 0x7B), v)


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
