"""The format table against what torch itself says of each dtype."""

import pytest
import torch

from elmo_compile.errors import OptionError
from elmo_compile.numerics.formats import BF16, E4M3, E5M2, FORMATS, format_of, is_narrow


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_table_agrees_with_torch(fmt):
    info = torch.finfo(fmt.dtype)
    assert fmt.max == info.max
    assert fmt.min_normal == info.tiny
    assert 2.0**-fmt.mantissa_bits == info.eps
    assert fmt.random_bits == 23 - fmt.mantissa_bits
    assert fmt.random_mask == 2**fmt.random_bits - 1
    smallest = torch.tensor([1], dtype=torch.uint8 if info.bits == 8 else torch.int16)
    assert fmt.min_step == smallest.view(fmt.dtype).double().item()
    assert format_of(fmt.dtype) is fmt
    assert is_narrow(fmt.dtype)


def test_numbers_of_the_specification():
    assert [fmt.random_bits for fmt in (BF16, E4M3, E5M2)] == [16, 20, 21]
    assert [fmt.shift for fmt in (BF16, E4M3, E5M2)] == [0, 2**-6, 2**-14]
    assert [fmt.keeps_inf for fmt in (BF16, E4M3, E5M2)] == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fnuz, "bf16", None])
def test_other_dtypes_are_refused_with_the_accepted_ones_named(dtype):
    with pytest.raises(OptionError, match="float8_e4m3fn"):
        format_of(dtype)


def test_wide_dtypes_are_not_narrow():
    assert not any(is_narrow(d) for d in (torch.float64, torch.float32, torch.float16, torch.int8))
