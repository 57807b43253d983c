"""Every kernel, compiled for each chip without one: it fits, spills nothing, uses the tensor cores.

The launches are recorded from calls on meta tensors: a driver that waited for the device, by
reading a value, would fail here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elmo_compile.kernels.triton.configs import SHARED_LIMIT

SCRIPT = Path(__file__).with_name("compile_cubins.py")
PRODUCTS = {"_bce_rows_kernel", "_ce_rows_kernel", "_gradient_kernel", "_features_kernel"} | {
    "_dw_kernel",
    "update_kernel",
    "_keys_kernel",
}
ALL = tuple(SHARED_LIMIT)
CASES = [
    # chip, targets, stored, compute, update, N, D; then whether it is one of the quick ones
    (90, "pairs", "fp8", "bf16", "sgd", 128, 768, True),
    (90, "classes", "bf16", "bf16", "adamw kahan", 128, 768, True),
    (80, "pairs", "fp8", "bf16", "adamw kahan", 128, 768, True),
    (89, "pairs", "fp8", "bf16", "sgd", 128, 768, True),
    (100, "classes", "fp8", "bf16", "sgd", 128, 768, True),
    *((chip, "pairs", "fp8", "bf16", "kahan rows", 128, 768, False) for chip in (89, 90, 100)),
    *(
        (chip, "classes", "bf16", "bf16", "adamw float32", 2048, 1024, False)
        for chip in SHARED_LIMIT
    ),
    *((chip, "dense", "fp16", "fp16", "sgd", 128, 768, False) for chip in ALL),
    *((chip, "values", "bf16", "bf16", "sgd", 128, 768, False) for chip in ALL),
    *(
        (chip, "pairs", "fp32", "fp32", "momentum float32", 128, 768, False)
        for chip in SHARED_LIMIT
    ),
    # Nothing a multiple of anything: masks everywhere; and a batch smaller than a tile.
    *((chip, "pairs", "fp8", "bf16", "sgd", 37, 301, False) for chip in ALL),
]


def compiled(*case: object) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("chip", "targets", "stored", "compute", "update", "rows", "features"),
    [pytest.param(*c[:-1], marks=() if c[-1] else pytest.mark.slow) for c in CASES],
)
def test_kernels_fit_the_chip(
    chip: int,
    targets: str,
    stored: str,
    compute: str,
    update: str,
    rows: int,
    features: int,
) -> None:
    kernels = compiled(chip, targets, stored, compute, update, rows, features)
    missing = "_ce_rows_kernel" if targets != "classes" else "_bce_rows_kernel"
    names = PRODUCTS | {"_db_kernel", "_parameters_kernel"}
    not_there = {missing} | ({"_parameters_kernel"} if update == "kahan rows" else set())
    assert {k["name"] for k in kernels} == names - not_there
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT[chip], kernel
        assert kernel["spilled"] == 0, kernel
        assert not kernel["atomics"], kernel
        if compute != "fp32" and kernel["name"] in PRODUCTS:
            assert kernel["tensor cores"], kernel


def test_importing_the_package_does_not_import_the_kernels() -> None:
    """torch itself may import Triton; this family must not be what does."""
    name = "elmo_compile.kernels.triton"
    code = f"import elmo_compile, elmo_compile.kernels, sys; assert '{name}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
