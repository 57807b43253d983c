"""Every kernel, compiled for each chip without one: it fits, spills nothing, uses the tensor cores.

The launches are recorded from calls on meta tensors: a driver that waited for the device, by
reading a value, would fail here. What each kernel takes is compared with the committed table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from elmo_compile.kernels.triton.configs import SHARED_LIMIT

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from cubin_table import CASES, QUICK, RESULTS, Case  # noqa: E402

TABLE = json.loads(RESULTS.read_text())
PRODUCTS = {"bce_rows_kernel", "ce_rows_kernel", "gradient_kernel", "features_kernel"} | {
    "dw_kernel",
    "update_kernel",
    "features_update_kernel",
    "keys_kernel",
}
SHARING = (90, 100)
"""Chips whose update shares a pass with dx where a tile holds the batch."""
REGISTERS_SLACK = 8
"""Registers are given out by eights."""


def compiled(case: Case) -> list[dict[str, Any]]:
    """In a process of its own: the tests' process is bound to the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "cubin_table.py"), "--case", *map(str, case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(case: Case, kernels: list[dict[str, Any]]) -> None:
    fits = case.rows <= (64 if case.features % 16 else 128)
    shares = case.chip in SHARING and case.compute != "fp32" and fits
    not_there = {
        "ce_rows_kernel" if case.targets != "classes" else "bce_rows_kernel",
        "update_kernel" if shares else "features_update_kernel",
    }
    names = (
        PRODUCTS
        | {"records_kernel", "scale_kernel"}
        | ({"parameters_kernel"} if case.update != "kahan rows" else set())
    )
    if case.stored in ("bf16", "fp8"):
        names |= {"row_keys_kernel"}
        names |= {"parameter_keys_kernel"} if case.update != "kahan rows" else set()
    if case.targets == "classes" and case.stored == case.compute != "fp8" and case.rows <= 64 * 16:
        names |= {"row_sums_kernel", "row_gradient_kernel"}
    # The bias has a kernel of its own where no tile holds the batch.
    assert {k["kernel"] for k in kernels} - {"db_kernel"} == names - not_there
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT[case.chip], kernel
        assert kernel["spilled"] == 0, kernel
        assert not kernel["atomics"], kernel
        assert not kernel["serialized"], kernel
        if case.compute != "fp32" and kernel["kernel"] in PRODUCTS:
            assert kernel["tensor_cores"], kernel


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case in QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
def test_kernels_fit_the_chip(case: Case) -> None:
    kernels = compiled(case)
    check(case, kernels)
    if triton.__version__ != TABLE["triton"]:
        return  # another compiler: only the limits hold
    for now, before in zip(kernels, TABLE["cases"][case.name], strict=True):
        assert now["kernel"] == before["kernel"]
        assert now["registers"] <= before["registers"] + REGISTERS_SLACK, (now, before)
        assert now["shared"] <= before["shared"], (now, before)
        assert now["blocks"] >= before["blocks"], (now, before)
        assert now["instructions"] <= 1.05 * before["instructions"], (now, before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_committed_table_is_of_kernels_that_fit(case: Case) -> None:
    """Also the cases that only `-m slow` compiles."""
    check(case, TABLE["cases"][case.name])


def test_the_committed_table_has_no_other_cases() -> None:
    assert set(TABLE["cases"]) == {case.name for case in CASES}


def test_importing_the_package_does_not_import_the_kernels() -> None:
    """torch itself may import Triton; this family must not be what does."""
    name = "elmo_compile.kernels.triton"
    code = f"import elmo_compile, elmo_compile.kernels, sys; assert '{name}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
