"""A tensor times a factor on the device, in place."""

from __future__ import annotations

import pytest
import torch

from elmo_compile.kernels import aten
from elmo_compile.kernels import triton as family

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (), (70, 1000)])
def test_scaled_to_nearest(dtype, shape, device):
    torch.manual_seed(0)
    made = torch.randn(shape).to(dtype)
    factor = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = (made.to(wide) * factor).to(dtype)
    on_device, on_host = made.to(device), made.clone()
    family.scale_(on_device, factor.to(device))
    aten.scale_(on_host, factor)
    torch.testing.assert_close(on_device.cpu(), wanted, rtol=0, atol=0)
    torch.testing.assert_close(on_host, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan"), -1.0])
def test_factors_that_are_no_ordinary_numbers(factor, device):
    """A gradient that is 0 stays so: eager leaves it out before it multiplies."""
    for dtype in DTYPES:
        made = torch.tensor([1.0, -2.0, float("nan"), 0.0], device=device, dtype=dtype)
        wanted = made * factor
        wanted[-1] = 0.0
        on_host = made.cpu().clone()
        family.scale_(made, torch.tensor(factor, device=device))
        torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True)
        aten.scale_(on_host, torch.tensor(factor))
        torch.testing.assert_close(on_host, wanted.cpu(), rtol=0, atol=0, equal_nan=True)


def test_nothing_is_written_for_one(device):
    """Not even what a product with 1 would change: a signalling NaN keeps its bits."""
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x3F800000], dtype=torch.int32, device=device)
    made = bits.clone().view(torch.float32)
    family.scale_(made, torch.ones((), device=device))
    assert torch.equal(made.view(torch.int32), bits)
    on_host = bits.cpu().view(torch.float32)
    before = on_host._version
    aten.scale_(on_host, torch.ones(()))
    assert on_host._version == before


def test_more_than_the_programs_hold_at_once(device, monkeypatch):
    from elmo_compile.kernels.triton import scale

    monkeypatch.setattr(scale, "_BLOCK", 16)
    monkeypatch.setattr(scale, "_PROGRAMS", 1)
    made = torch.arange(1000.0, device=device)
    family.scale_(made, torch.tensor(3.0, device=device))
    torch.testing.assert_close(made.cpu(), 3 * torch.arange(1000.0), rtol=0, atol=0)
