"""Heads stored in bf16 or fp8 without a float32 copy."""

from elmo_compile.heads.convert import convert_head, dequantize_head, exclude
from elmo_compile.heads.low_precision import LowPrecisionLinear

__all__ = ["LowPrecisionLinear", "convert_head", "dequantize_head", "exclude"]
