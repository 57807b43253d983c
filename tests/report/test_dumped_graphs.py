"""`report.dump` writes graphs that run: before and after give the same loss on the same inputs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import elmo_compile as elmo

L = 203
OPTIONS = {"lower": "eager", "min_outputs": 64, "chunk_size": 77}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.encoder, self.head = kind, nn.Linear(5, 16), nn.Linear(16, L)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = torch.tanh(self.encoder(x))
        if self.kind == "checkpointed":
            return checkpoint(lambda h: F.cross_entropy(self.head(h), y), h, use_reentrant=False)
        z = self.head(h)
        smoothing = 0.1 if self.kind == "program" else 0.0
        loss = F.cross_entropy(z, y, label_smoothing=smoothing)
        return (loss, z) if self.kind == "logits" else loss


@pytest.mark.parametrize(
    ("kind", "fused"),
    [("plain", True), ("checkpointed", False), ("program", True), ("logits", False)],
)
def test_they_run_and_agree(kind: str, fused: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model: Any = Net(kind)
    optimizer = elmo.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    step = torch.compile(model, backend="elmo", options=OPTIONS)
    step(torch.randn(6, 5), torch.randint(0, L, (6,)))
    report = elmo.last_report()
    assert [match.fused_update for match in report.matches] == [fused]
    report.dump(tmp_path)
    losses = []
    for name in ("before", "after"):
        (file,) = tmp_path.rglob(f"{name}.py")
        ran = subprocess.run(
            [sys.executable, str(file)], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        found = re.match(r"\(tensor\(([-0-9.]+)", ran.stdout)
        assert found is not None, ran.stdout
        losses.append(float(found[1]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    del optimizer
