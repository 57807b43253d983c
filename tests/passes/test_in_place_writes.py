"""In-place writes beside a head: harmless where the head reads what was written only afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import (
    L,
    N,
    assert_identical,
    assert_same,
    compiled,
    features,
    refusals,
    run,
    weight,
)

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


def z_loss(x, w, y):
    z = F.linear(x, w)
    labels = y.clone()
    labels[:2] = -100
    return F.cross_entropy(z, labels) + 1e-3 * z.logsumexp(-1).square().mean()


def entropy_bonus(x, w, y):
    z = F.linear(x, w)
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    labels = y.clone()
    labels[y % 3 == 0] = -100
    return F.nll_loss(logp, labels) - 0.01 * entropy.mean()


def logged_mean(x, w, y):
    z = F.linear(x, w)
    logged = z.detach().mean()
    labels = y.clone()
    labels.masked_fill_(y % 3 == 0, -100)
    return F.cross_entropy(z, labels) + logged


def smoothed(x, w, y):
    """As transformers.LabelSmoother has it."""
    z = F.linear(x, w)
    logp = -F.log_softmax(z, -1)
    labels = y.clone().unsqueeze(-1)
    padded = labels.eq(-100)
    labels.clamp_(min=0)
    nll, all_of_row = logp.gather(-1, labels), logp.sum(-1, keepdim=True)
    nll.masked_fill_(padded, 0.0)
    all_of_row.masked_fill_(padded, 0.0)
    count = padded.numel() - padded.long().sum()
    return 0.9 * nll.sum() / count + 0.1 * all_of_row.sum() / (count * L)


def written_result(x, w, y):
    z = F.linear(x, w)
    each = F.cross_entropy(z, y.clamp_min(0), reduction="none")
    each[y == -100] = 0.0
    return each.sum() + 1e-3 * z.logsumexp(-1).square().mean()


@pytest.mark.parametrize("program", [z_loss, entropy_bonus, logged_mean, smoothed, written_result])
def test_a_write_between_two_results_that_nothing_is_moved_past(program):
    assert_same(program, (features(), weight(), padded_classes()))


def labels_from_a_result(x, w, y):
    z = F.linear(x, w)
    labels = y.clamp_min(0)
    uncertain = z.detach().logsumexp(-1)
    labels[uncertain > uncertain.mean()] = 7
    return F.cross_entropy(z, labels) + uncertain.mean()


def result_written_before_it_is_read(x, w, y):
    z = F.linear(x, w)
    largest = z.detach().amax(-1, keepdim=True)
    largest.add_(1.0)
    return F.cross_entropy(z - largest, y.clamp_min(0)) + (z - largest).exp().mean()


def read_by_what_follows_a_result(x, w, y):
    z = F.linear(x, w)
    weights = torch.ones(N)
    first = (F.cross_entropy(z, y.clamp_min(0), reduction="none") + weights).sum()
    weights[:2] = 5.0
    return first + (z.logsumexp(-1) + weights).sum()


def read_of_what_follows_a_result(x, w, y):
    z = F.linear(x, w)
    total = torch.zeros(())
    total += F.cross_entropy(z, y.clamp_min(0))
    double = total * 2
    return double + z.logsumexp(-1).square().mean() + total


def read_after_a_write_of_what_follows(x, w, y):
    z = F.linear(x, w)
    seen = torch.zeros(N)
    seen += z.detach().amax(-1)
    doubled = seen * 2
    kept = torch.ones(N)
    kept.copy_(seen)
    return F.cross_entropy(z, y.clamp_min(0)) + (doubled + kept).sum()


def two_views_of_a_result(x, w, y):
    z = F.linear(x, w)
    largest = z.detach().amax(-1)
    column = largest.unsqueeze(-1)
    largest *= 2
    return F.cross_entropy(z, y.clamp_min(0)) + column.sum() + largest.sum()


MOVED = [labels_from_a_result, result_written_before_it_is_read, read_by_what_follows_a_result]
KEPT = [read_of_what_follows_a_result, read_after_a_write_of_what_follows, two_views_of_a_result]


@pytest.mark.parametrize("program", MOVED)
def test_a_write_that_something_would_be_moved_past_is_refused(program):
    assert_same(program, (features(), weight(), padded_classes()), count=0)
    (refusal,) = refusals()
    assert refusal.code == Code.MUTATION


@pytest.mark.parametrize("program", KEPT)
def test_what_is_put_off_keeps_its_order(program):
    args = (features(), weight(), padded_classes())
    assert_identical(run(compiled(program), args), run(program, args))


def quiet(x, w, y):
    z = F.linear(x, w)
    loss = F.cross_entropy(z, y.clamp_min(0))
    with torch.no_grad():
        logged = loss * 2
    return loss + z.logsumexp(-1).square().mean() + logged * x.sum()


def test_what_is_put_off_stays_without_gradient():
    assert_same(quiet, (features(), weight(), padded_classes()))


def in_bfloat16(x, w, y):
    z = F.linear(x, w)
    each = F.cross_entropy(z, y.clamp_min(0), reduction="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = each[None] @ each[:, None]
    return z.logsumexp(-1).mean() + pairs.sum()


def test_what_would_leave_its_autocast_is_refused():
    args = (features(), weight(), padded_classes())
    assert_identical(run(compiled(in_bfloat16), args), run(in_bfloat16, args))
    (refusal,) = refusals()
    assert "autocast" in refusal.reason


def two_heads(x, w, y, v):
    """What is put off here is the other head, which has read the labels."""
    labels = y.clamp_min(0)
    z = F.linear(x, w)
    u = F.linear(x.detach(), v.detach())
    picked = (u * (labels.unsqueeze(-1) == torch.arange(L))).sum(-1, keepdim=True)
    level = z.detach().logsumexp(-1, keepdim=True)
    other = (picked - (u - level).logsumexp(-1, keepdim=True)).sum()
    labels[:3] = 1
    return other + F.cross_entropy(z, labels)


def test_another_head_is_not_put_off_past_a_write():
    args = (features(), weight(), padded_classes(), weight())
    assert_identical(run(compiled(two_heads), args), run(two_heads, args))
