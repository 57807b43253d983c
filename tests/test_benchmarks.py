"""The GPU benchmark runs, at sizes that mean nothing: a lent GPU must not meet its first bug."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.parametrize(
    "parts",
    [
        ["bce", "ce", "labels", "tune"],
        ["step"],
    ],
)
def test_the_gpu_benchmark_runs_dry(parts, tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--dry", "--parts", *parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"environment", "ceilings", *parts}
    failed = [row for row in rows if "failed" in row]
    missing = {"Liger", "cut-cross-entropy", "cut-cross-entropy, exact", "quack"}
    assert {row.get("contender") for row in failed} <= missing, failed
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"**{part}**" in text for part in parts)
