"""The narrow formats a weight can be stored in, as data. Rounding reads everything from here."""

from __future__ import annotations

import dataclasses

import torch

from elmo_compile.errors import OptionError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageFormat:
    """One floating-point format narrower than float32, with what rounding to it needs."""

    name: str
    """Short name, as in reports: `bf16`, `e4m3`, `e5m2`."""
    dtype: torch.dtype
    """The torch dtype stored."""
    max: float
    """Largest finite value. It lies on the grid, so a value clamped to it needs no second clamp."""
    mantissa_bits: int
    """Explicit mantissa bits."""
    random_bits: int
    """Bits of a float32 mantissa below the grid: `23 - mantissa_bits`, the random bits used."""
    min_normal: float
    """Smallest normal value; the grid is uniform from 0 to twice this."""
    shift: float
    """Added below `min_normal` so that float32's exponent gives the subnormals' step; 0 for bf16,
    whose subnormals are float32's own."""
    keeps_inf: bool
    """Whether an infinity is stored as such (bf16) or saturates to `max` (fp8)."""

    @property
    def random_mask(self) -> int:
        """`2^random_bits - 1`: the low bits used of a random word, and cleared in a value."""
        return (1 << self.random_bits) - 1

    @property
    def min_step(self) -> float:
        """Distance between neighbours below `2 min_normal`: the smallest positive value stored."""
        return self.min_normal * 2.0**-self.mantissa_bits


BF16 = StorageFormat(
    name="bf16",
    dtype=torch.bfloat16,
    max=(2 - 2.0**-7) * 2.0**127,
    mantissa_bits=7,
    random_bits=16,
    min_normal=2.0**-126,
    shift=0.0,
    keeps_inf=True,
)
E4M3 = StorageFormat(
    name="e4m3",
    dtype=torch.float8_e4m3fn,
    max=448.0,
    mantissa_bits=3,
    random_bits=20,
    min_normal=2.0**-6,
    shift=2.0**-6,
    keeps_inf=False,
)
E5M2 = StorageFormat(
    name="e5m2",
    dtype=torch.float8_e5m2,
    max=57344.0,
    mantissa_bits=2,
    random_bits=21,
    min_normal=2.0**-14,
    shift=2.0**-14,
    keeps_inf=False,
)

FORMATS: tuple[StorageFormat, ...] = (BF16, E4M3, E5M2)
_BY_DTYPE = {format.dtype: format for format in FORMATS}


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a weight of this dtype is rounded when it is stored (bf16 and the fp8 formats)."""
    return dtype in _BY_DTYPE


def format_of(dtype: torch.dtype) -> StorageFormat:
    """The storage format of a torch dtype.

    Args:
        dtype: torch.bfloat16, torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        The one record of that format.

    Raises:
        OptionError: any other dtype, or something that is no dtype.
    """
    found = _BY_DTYPE.get(dtype) if isinstance(dtype, torch.dtype) else None
    if found is None:
        accepted = ", ".join(str(format.dtype) for format in FORMATS)
        raise OptionError(
            f"no narrow storage format for dtype {dtype!r}; rounding is defined for {accepted}. "
            "Wider dtypes need no rounding: cast with `.to()`."
        )
    return found
