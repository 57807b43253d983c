"""Write `oracle.json`: rankings, labels, and what napkinXC 0.7.2 says of them.

    pip install napkinxc scipy && python tests/metrics/make_oracle.py

The tests read the file, so that they need neither package.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from napkinxc import metrics
from scipy.sparse import csr_matrix

POINTS, LABELS, KEPT = 40, 30, 6


def main() -> None:
    """Draw one small corpus with a long tail and some points without labels; score it."""
    rng = np.random.default_rng(20240607)
    weight = 1 / np.arange(1, LABELS + 1)
    chance = weight / weight.sum()

    def draw(most: int) -> list[list[int]]:
        sizes = rng.integers(0, most + 1, POINTS)
        return [sorted(rng.choice(LABELS, n, replace=False, p=chance).tolist()) for n in sizes]

    train, test = draw(8), draw(9)
    ranked = [rng.choice(LABELS, KEPT, replace=False, p=chance).tolist() for _ in range(POINTS)]
    matrix = csr_matrix(
        (
            np.ones(sum(map(len, train))),
            np.concatenate([np.array(row, dtype=np.int64) for row in train]),
            np.cumsum([0] + [len(row) for row in train]),
        ),
        shape=(POINTS, LABELS),
    )
    inverse = {
        name: np.asarray(metrics.Jain_et_al_inverse_propensity(matrix, A=a, B=b)).ravel().tolist()
        for name, a, b in (("wikipedia", 0.5, 0.4), ("amazon", 0.6, 2.6), ("default", 0.55, 1.5))
    }
    scores = {
        "P": metrics.precision_at_k(test, ranked, k=KEPT),
        "nDCG": metrics.ndcg_at_k(test, ranked, k=KEPT),
        "R": metrics.recall_at_k(test, ranked, k=KEPT),
        "PSP": metrics.psprecision_at_k(test, ranked, np.array(inverse["default"]), k=KEPT),
    }
    record = {
        "napkinxc": version("napkinxc"),
        "num_labels": LABELS,
        "train": train,
        "test": test,
        "ranked": ranked,
        "inverse_propensity": inverse,
        "scores": {name: np.asarray(values).tolist() for name, values in scores.items()},
    }
    path = Path(__file__).with_name("oracle.json")
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
