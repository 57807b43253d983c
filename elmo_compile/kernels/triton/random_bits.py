"""The random word of a stored element, bit for bit numerics/philox.py.

row key      = word 0 of Philox4x32-10, key (seed, param), counter (row_lo, row_hi, word2, word3)
element word = mix32(row key XOR column)
"""

import triton
import triton.language as tl


@triton.jit
def row_keys(row, seed, param, word2, word3):
    """uint32 keys of rows (integers, any shape); the other words are int32 scalars."""
    row = row.to(tl.int64)
    c0 = row.to(tl.uint32)
    c1 = (row >> 32).to(tl.uint32)
    zero = c0 ^ c0
    c2 = zero + word2.to(tl.uint32, bitcast=True)
    c3 = zero + word3.to(tl.uint32, bitcast=True)
    k0 = zero + seed.to(tl.uint32, bitcast=True)
    k1 = zero + param.to(tl.uint32, bitcast=True)
    m0 = zero + 0xD2511F53
    m1 = zero + 0xCD9E8D57
    w0 = zero + 0x9E3779B9
    w1 = zero + 0xBB67AE85
    for _ in tl.static_range(10):
        hi0, hi1 = tl.umulhi(m0, c0), tl.umulhi(m1, c2)
        lo0, lo1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 += w0
        k1 += w1
    return c0


@triton.jit
def mix32(h):
    """A bijective mixer of uint32 words."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def element_words(keys_L, columns_D):
    """uint32 [L, D] words of elements from uint32 row keys and int32 columns."""
    return mix32(keys_L[:, None] ^ columns_D.to(tl.uint32)[None, :])
