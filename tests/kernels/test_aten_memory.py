"""No [N, L] and no [L, D] tensor on a CPU, measured; the counter itself."""

from __future__ import annotations

import pytest
import torch

from elmo_compile.kernels import aten
from elmo_compile.kernels.aten import head
from elmo_compile.numerics.update import Update
from elmo_compile.testing.memory import peak_bytes

from .head_cases import FP8, problem


def test_counter_counts_storages_once_and_while_they_live() -> None:
    x = torch.empty(1000)

    def run() -> None:
        a = torch.empty(1 << 10, dtype=torch.uint8)
        a.view(2, -1).add_(1)
        del a
        b = torch.empty(1 << 11, dtype=torch.uint8)
        x.mul_(2)
        b.clone()

    assert peak_bytes(run) == 1 << 12


@pytest.mark.parametrize(
    ("kind", "weight"), [("ce", torch.float32), ("ce", torch.bfloat16), ("bce", FP8)]
)
def test_temporaries_are_a_few_chunks(
    kind: str, weight: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager pieces: the counter does not see into compiled ones, which need less."""
    monkeypatch.setattr(head, "SMALL", 1 << 60)
    rows, features, outputs, chunk = 256, 256, 5_000, 16
    compute = torch.float32 if weight == torch.float32 else torch.bfloat16
    p = problem(
        kind, num_rows=rows, num_features=features, num_outputs=outputs, weight=weight,
        compute=compute, chunk=chunk,
    )  # fmt: skip
    stats_2N, scale_N = aten.forward(p).stats_2N, torch.ones(rows)
    per_output = 4 * outputs  # bias, its gradient, row keys
    words = 4 * chunk * (rows + features)
    budget = 3 * per_output + 34 * words
    assert budget < outputs * rows * compute.itemsize
    assert budget < outputs * features * weight.itemsize
    assert peak_bytes(aten.forward, p) < budget
    assert peak_bytes(aten.backward, p, stats_2N, scale_N, need_dw=False) < budget
    for rounding in ("stochastic", "nearest"):
        update = Update(lr=0.1, rounding=rounding)
        fused = peak_bytes(aten.backward_update, p, stats_2N, scale_N, update, need_value=True)
        assert fused < budget
