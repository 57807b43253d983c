"""Unit tests for a head of one's own: it is rewritten, and nothing changed but the memory.

    pytest examples/test_my_head.py

`assert_rewritten` fails with the report, so that a refactoring which hides the pattern from the
backend is caught where it happens and not in a memory graph.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.testing import assert_rewritten

BATCH, FEATURES, CLASSES = 8, 32, 20_000


class MyHead(nn.Module):
    """Dropout, one logit a class, cross entropy; the last logit belongs to padding, unused."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.project = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Mean loss over the rows whose class is not -100."""
        return F.cross_entropy(self.project(self.dropout(x)).float(), classes)


@pytest.fixture
def model() -> MyHead:
    torch.manual_seed(0)
    return MyHead().eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    classes = torch.randint(0, CLASSES, (BATCH,))
    classes[0] = -100
    return torch.randn(BATCH, FEATURES), classes


def test_it_is_rewritten(model: MyHead, batch: tuple[Tensor, Tensor]) -> None:
    assert_rewritten(model.train(), *batch, loss="cross_entropy", count=1)


def test_its_update_is_fused(model: MyHead, batch: tuple[Tensor, Tensor]) -> None:
    optimizer = elmo.optim.SGD(model.parameters(), lr=0.1)
    assert_rewritten(model, *batch, loss="cross_entropy", fused_update=True)
    torch.compile(model, backend="elmo")(*batch).backward()
    assert model.project.weight.grad is None
    assert len(optimizer.fused_parameters()) == 1


def test_loss_and_gradients_are_eagers(model: MyHead, batch: tuple[Tensor, Tensor]) -> None:
    def run(f: nn.Module) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss = f(*batch)
        loss.backward()
        return loss.detach(), model.project.weight.grad

    torch.testing.assert_close(run(torch.compile(model, backend="elmo")), run(model))


def test_a_head_that_cannot_be_rewritten_says_so(batch: tuple[Tensor, Tensor]) -> None:
    class Softened(MyHead):
        def forward(self, x: Tensor, classes: Tensor) -> Tensor:
            logits = self.project(x)
            return F.cross_entropy(logits, classes) + logits.sort().values[:, 0].mean()

    report = elmo.explain(Softened(), *batch)
    assert not report.matches
    assert report.refusals[0].remedy
