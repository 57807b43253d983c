"""What is compared in a program is rounded as the user's program has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_rounds_float64_as_casts_do(dtype: torch.dtype, compiled: bool) -> None:
    x = torch.randn(10_000, dtype=torch.float64)
    x = torch.cat([x, x.to(dtype).double(), torch.tensor(EDGES, dtype=torch.float64)])
    through = torch.compile(round_through) if compiled else round_through
    expected = x.to(dtype).double()
    torch.testing.assert_close(through(x, dtype), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rounded(x, dtype), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_ranks_in_a_narrower_dtype(dtype: torch.dtype, lower: str) -> None:
    """A label is never above nor below itself, whatever dtype the user compares in."""
    torch.manual_seed(0)
    head = nn.Linear(8, 96, dtype=torch.float64)
    x, labels = torch.randn(200, 8, dtype=torch.float64), torch.randint(96, (200, 1))

    def ranks(x: Tensor) -> tuple[Tensor, Tensor]:
        z = head(x).to(dtype)
        own = z.gather(-1, labels)
        return (z > own).sum(-1), (z >= own).sum(-1)

    compiled = torch.compile(ranks, backend="elmo", options={"lower": lower, "min_outputs": 32})
    with torch.no_grad():
        for mine, theirs in zip(compiled(x), ranks(x)):
            assert torch.equal(mine, theirs)
