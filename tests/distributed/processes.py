"""Running a script once for each process of a group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(folder: Path, world: int, *case: str, script: Path) -> None:
    """Run `script RANK WORLD FOLDER CASE...` in every process of a case."""
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(folder), *case],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        for process in running:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in running:
            process.kill()
