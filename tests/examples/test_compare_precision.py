"""compare_precision.py: the interval, the counter-example, and a quick run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import compare_precision
import compare_report
import numpy as np
import paper_rounding
import pytest
import torch

VARIANTS = ["float32", "fp8 paper", "fp8 stochastic"]


def test_paper_rounding_loses_small_updates_and_elmos_does_not() -> None:
    """From 0, an update of 0.3 of a subnormal step: one is always 0, the other 0.3 on average."""
    import elmo_compile as elmo

    step = 2.0**-9
    v = torch.full((512, 64), 0.3 * step)
    generator = torch.Generator().manual_seed(0)
    paper = paper_rounding.paper_round_e4m3(v, generator).float()
    assert paper.count_nonzero() == 0
    unbiased = elmo.stochastic_round(v, torch.float8_e4m3fn, seed=0).float()
    deviation = step * (0.3 * 0.7 / v.numel()) ** 0.5
    assert abs(unbiased.mean().item() - 0.3 * step) < 5 * deviation


def test_paper_rounding_is_unbiased_among_normal_numbers() -> None:
    v = torch.full((512, 64), 1.04)
    generator = torch.Generator().manual_seed(0)
    rounded = paper_rounding.paper_round_e4m3(v, generator).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.125}
    assert rounded.mean().item() == pytest.approx(1.04, abs=5 * 0.125 * 0.5 / 181)
    extreme = torch.tensor([1e9, -1e9, 448.0, 0.0])
    assert paper_rounding.paper_round_e4m3(extreme, generator).float().tolist() == [
        448.0,
        -448.0,
        448.0,
        0.0,
    ]


def test_an_interval_by_group_is_wider_than_one_by_point() -> None:
    """Ten copies of each point: resampling copies one by one pretends to ten times the data."""
    rng = np.random.default_rng(0)
    gained = np.repeat(rng.choice([-1.0, 0.0, 1.0], 100, p=[0.1, 0.7, 0.2]), 10)[None]
    possible = np.ones(1000)
    by_group = compare_report.paired_interval(gained, possible, np.repeat(np.arange(100), 10))
    by_point = compare_report.paired_interval(gained, possible, np.arange(1000))
    width = [i["high"] - i["low"] for i in (by_group, by_point)]
    assert by_group["difference"] == pytest.approx(gained.mean())
    assert by_group["low"] < by_group["difference"] < by_group["high"]
    assert 2 < width[0] / width[1] < 4.5
    error = 1.96 * gained[0, ::10].std() / 10
    assert width[0] / 2 == pytest.approx(error, rel=0.15)


def test_no_difference_has_an_interval_of_zero() -> None:
    interval = compare_report.paired_interval(np.zeros((3, 8)), np.ones(8), np.arange(8))
    assert (interval["difference"], interval["low"], interval["high"]) == (0, 0, 0)
    assert interval["by_seed"] == [0, 0, 0]


@pytest.fixture(scope="module")
def finished(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare")
    compare_precision.main(arguments(small_data, out))
    return out


def arguments(data: Path, out: Path) -> list[str]:
    return [
        *("--quick", "--threads", "1", "--data", str(data), "--out", str(out)),
        *("--variants", ",".join(VARIANTS)),
    ]


def test_a_quick_run_reports_every_head_in_both_stages(finished: Path) -> None:
    report = json.loads((finished / "results.json").read_text())
    found = {(run["stage"], run["variant"]) for run in report["runs"]}
    assert found == {(stage, variant) for stage in ("trained", "frozen") for variant in VARIANTS}
    assert len(report["differences"]) == 2 * 2 * len(compare_report.METRICS)
    sizes = {run["variant"]: run["head_bytes"] for run in report["runs"]}
    assert sizes["float32"] == 4 * sizes["fp8 stochastic"] == 4 * sizes["fp8 paper"]
    assert (finished / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated(
    finished: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeated(*args: object) -> None:
        raise AssertionError(f"repeated {args[0]}")

    monkeypatch.setattr(compare_precision, "train_one", repeated)
    compare_precision.main(arguments(small_data, finished))


def test_deciles_hold_each_point_once(small_data: Path) -> None:
    data = compare_precision.load(small_data)
    deciles = compare_report.frequency_deciles(data)
    assert np.bincount(deciles).tolist() == [4] * 10


def test_unknown_variants_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_precision.main(["--variants", "fp4"])
    assert "'fp4' is not one of float32" in capsys.readouterr().err
