"""Examples import each other as scripts do; a small data set in the form of the carried one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

FEATURES, LABELS, POINTS = 256, 60, {"trn": 200, "tst": 40}


@pytest.fixture(scope="session")
def examples() -> Path:
    return EXAMPLES


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points with the numbers of their labels among their features, so that they can be learnt."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, points in POINTS.items():
        lines = [f"{points} {FEATURES} {LABELS}"]
        for _ in range(points):
            labels = np.unique(rng.integers(0, LABELS, rng.integers(1, 4)) ** 2 // LABELS)
            words = np.unique(np.concatenate([labels, rng.integers(LABELS, FEATURES, 5)]))
            pairs = " ".join(f"{word}:{rng.integers(1, 4)}" for word in words)
            lines.append(f"{','.join(map(str, labels))} {pairs}")
        (folder / f"{part}_xmlrepo.txt").write_text("\n".join(lines) + "\n")
        groups = "".join(f"{point // 2}\n" for point in range(points))
        (folder / f"{part}_groups.txt").write_text(groups)
    names = "".join(f"name-{label}\n" for label in range(LABELS))
    (folder / "labels.txt").write_text(names)
    return folder
