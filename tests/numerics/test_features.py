"""Features in E4M3: known answers, the nearest codes, nothing lost by rounding twice."""

from __future__ import annotations

import pytest
import torch

from elmo_compile.numerics.features import FP8, round_features, to_codes


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """64 rows of all magnitudes that float32 has."""
    torch.manual_seed(0)
    return (torch.randn(64, 33) * torch.logspace(-36, 36, 64)[:, None]).to(dtype)


@pytest.mark.parametrize(
    ("row", "codes", "scale"),
    [
        ([448.0, 1.0], [448.0, 1.0], 1.0),
        ([449.0, 1.0], [224.0, 0.5], 2.0),
        ([-3.5, 0.0], [-448.0, 0.0], 2.0**-7),
        ([3.6, 0.1], [224.0, 6.5], 2.0**-6),  # 3.6 / 2^-6 = 230.4, halfway is 232
        ([1.0, 2.0**-18], [256.0, 0.0], 2.0**-8),  # 2^-10, half of the smallest: a tie, to even
        ([0.0, 0.0], [0.0, 0.0], 2.0**-9),
    ],
)
def test_known_answers(row: list[float], codes: list[float], scale: float) -> None:
    found, scales = to_codes(torch.tensor([row]))
    assert found.dtype == FP8
    assert found.float().tolist() == [codes]
    assert scales.tolist() == [scale]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounding_twice_changes_nothing(dtype: torch.dtype) -> None:
    once = round_features(rows(dtype))
    assert once.dtype == torch.bfloat16
    assert torch.equal(round_features(once).view(torch.int16), once.view(torch.int16))


def test_codes_times_scale_are_the_rounded_features() -> None:
    codes, scale = to_codes(rows())
    assert torch.equal(codes.double() * scale.double()[:, None], round_features(rows()).double())


def test_the_scale_is_the_smallest_power_of_two_that_fits() -> None:
    x = rows()[8:-2]  # smaller rows get the smallest scale there is
    codes, scale = to_codes(x)
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
    top = x.abs().amax(1)
    assert bool((top <= 448 * scale).all())
    assert bool((top > 224 * scale).all())
    assert not bool(codes.float().isnan().any())


def test_the_codes_are_the_nearest() -> None:
    """No other number of the format is nearer, for every element."""
    x = rows()[20:40]
    codes, scale = to_codes(x)
    every = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    every = every[every.isfinite()]
    exact = x.double() / scale.double()[:, None]
    least = (exact[..., None] - every).abs().amin(-1)
    assert torch.equal((exact - codes.double()).abs(), least)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_so(bad: float) -> None:
    """And its neighbours are as they would be without it."""
    x = rows()
    expected = round_features(x)
    x[5, 7] = bad
    found = round_features(x)
    assert bool(found[5].isnan().all())
    assert torch.equal(found[[4, 6]], expected[[4, 6]])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_round(shape: tuple[int, int]) -> None:
    assert round_features(torch.zeros(shape)).shape == shape
