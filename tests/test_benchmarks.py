"""The GPU benchmark runs, at sizes that mean nothing: a lent GPU must not meet its first bug."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "parts",
    [
        ["bce", "ce", "labels", "tune"],
        ["step"],
    ],
)
def test_the_gpu_benchmark_runs_dry(parts, tmp_path):
    command = [
        sys.executable,
        str(SCRIPTS / "gpu.py"),
        "--out",
        str(tmp_path),
        "--dry",
        "--parts",
        *parts,
    ]
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


def test_a_whole_step_is_counted_on_a_cpu(tmp_path):
    """What is allocated at the peak is more than what exists between steps, and resident."""
    file = tmp_path / "whole.json"
    command = [sys.executable, str(SCRIPTS / "whole_step.py"), "--tiny", "--only", "fp8 none"]
    command += ["--sizes", "8", "16", "3000", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(file.read_text())["rows"]
    assert 0 < row["with optimizer state MiB"] / 1024 < row["peak GiB"] < row["resident GiB"]
    assert row["head MiB"] < row["with optimizer state MiB"]
    assert "| fp8 | none | 3000 |" in file.with_suffix(".md").read_text()
