"""In-place writes beside a head: harmless where the head reads what was written only afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import L, N, assert_same, features, refusals, weight

from elmo_compile.report.records import Code


def padded_classes() -> torch.Tensor:
    """Classes, of which some are -100."""
    y = torch.randint(0, L, (N,))
    y[::3] = -100
    return y


def preferred(x, w, y):
    """The log-probabilities of a sequence, as preference losses have them."""
    z = x @ w.t()
    labels = y.clone()
    counted = labels != -100
    labels[labels == -100] = 0
    scores = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (scores * counted).sum()


def ignored_from_here(x, w, y):
    z = F.linear(x, w)
    labels = y.clone()
    labels.masked_fill_(labels % 3 == 0, -100)
    return F.cross_entropy(z, labels)


def weighted_rows(x, w, y):
    z = F.linear(x, w)
    weights = torch.ones(N)
    weights[y == -100] = 0.5
    return (F.cross_entropy(z, y, reduction="none") * weights).sum()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("program", [preferred, ignored_from_here, weighted_rows])
def test_what_is_read_after_the_write_only(program):
    assert_same(program, (features(), weight(), padded_classes()))


def shifted_before(x, w, y):
    z = F.linear(x, w)
    shift = torch.zeros(N)
    z = z + z.detach()[:, :1] * shift.unsqueeze(-1)
    shift.add_(1)
    return F.cross_entropy(z, y.clamp_min(0)) + shift.sum()


def test_what_was_read_before_the_write_is_not_moved_behind_it():
    assert_same(shifted_before, (features(), weight(), padded_classes()), count=0)
    (refusal,) = refusals()
    assert refusal.code == Code.MUTATION
