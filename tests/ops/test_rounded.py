"""What is compared in a program is rounded as the user's program has it."""

from __future__ import annotations

import pytest
import torch

from elmo_compile.ops.rounded import round_through, rounded

EDGES = [
    0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, -65520.0, 1e30, 3.4e38, 2.0**-14, 2.0**-24,
    2.0**-25, 2.0**-26, 1.5 * 2.0**-24, 6.1e-5, 1e-7, 1e-40, float("inf"), float("-inf"),
    float("nan"), 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_rounds_as_a_cast_does(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    usual = torch.randn(100_000) * torch.logspace(-9, 5, 100_000)
    x = torch.cat([torch.tensor(EDGES), bits, usual])
    through = torch.compile(round_through) if compiled else round_through
    expected = x.to(dtype).float()
    torch.testing.assert_close(through(x, dtype), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rounded(x, dtype), expected, rtol=0, atol=0, equal_nan=True)
