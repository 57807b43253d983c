"""bf16 and fp8 tensors as int32 lanes: two bf16 or four fp8 elements in one 32-bit word.

A vector unit works on 32-bit lanes. Code that loads or stores narrow elements one to a lane spends
most of its time converting (measured: benchmarks/NOTES.md); viewed as int32, every load and store
is a plain vector move, and the element of a lane is a shift or a mask away. All functions here are
exact re-encodings of values already on their format's grid, except `bf16_bits`.

Element order of a word is little endian: element 0 is in the low bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HIGH = -65536  # 0xffff0000
_E4M3_NAN = 0x7F
_NAN = 0x7FC00000
_EXPONENT_0 = 120 << 23  # E4M3's exponent e is e + 120 in float32
_MIN_STEP = 2.0**-9  # between E4M3's subnormals


def as_words(t: Tensor) -> Tensor:
    """A bf16 or fp8 tensor, contiguous in its last dimension, viewed as int32."""
    return t.view(torch.int32)


def unpack_bf16(words: Tensor) -> tuple[Tensor, Tensor]:
    """float32 values of elements 0 and 1 of each word."""
    return (words << 16).view(torch.float32), (words & _HIGH).view(torch.float32)


def bf16_bits(v: Tensor) -> Tensor:
    """Bits of float32 v rounded to bf16, to nearest even, in the high half of an int32.

    The cast `v.to(bfloat16)` on bits: NaN and infinities stay what they are.
    """
    bits = v.view(torch.int32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


def pack_bf16(even: Tensor, odd: Tensor) -> Tensor:
    """Words from the high halves of two int32 tensors (what is in the low halves is dropped)."""
    return ((even >> 16) & 0xFFFF) | (odd & _HIGH)


def e4m3_bits(byte: Tensor) -> Tensor:
    """Bits of the float32 value of an E4M3 byte, given as int32 in [0, 256)."""
    magnitude = byte & 0x7F
    # Few casts between int32 and float32 bits: each goes through memory when compiled.
    subnormal = (magnitude.to(torch.float32) * _MIN_STEP).view(torch.int32)
    bits = torch.where(magnitude < 8, subnormal, (magnitude << 20) + _EXPONENT_0)
    return torch.where(magnitude == _E4M3_NAN, _NAN, bits) | ((byte & 0x80) << 24)


def e4m3_bytes(words: Tensor) -> tuple[Tensor, ...]:
    """The four bytes of each word, as int32 in [0, 256)."""
    return tuple((words >> (8 * j)) & 0xFF for j in range(4))


def pack_bytes(bytes4: list[Tensor]) -> Tensor:
    """Words from four int32 tensors of bytes."""
    return bytes4[0] | (bytes4[1] << 8) | (bytes4[2] << 16) | (bytes4[3] << 24)


def halves_order(num_features: int, device: torch.device) -> Tensor:
    """int64 [D]: which column stands where when fp8 words are decoded to bf16 words.

    A word of four fp8 elements becomes two words of two bf16 elements. Writing the first of each to
    the left half of a row and the second to the right half keeps every store contiguous; columns
    (4i, 4i+1) are then at 2i, 2i+1 and columns (4i+2, 4i+3) at D/2 + 2i, D/2 + 2i + 1. Products
    over D do not care, as long as features are permuted alike.
    """
    quads = torch.arange(num_features, device=device).view(-1, 4)
    return torch.cat((quads[:, :2].reshape(-1), quads[:, 2:].reshape(-1)))
