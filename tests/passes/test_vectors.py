"""Values with one element an output, made beside the logits by what no program can chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import D, L, N, assert_same, bias, features, matches, rows, weight

ce = F.cross_entropy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def items(*more):
    """A head, classes, features of the items, and the weight of their bias."""
    side = (torch.randn(1, 4) / 2).requires_grad_()
    return (*rows(), torch.randn(L, 4).requires_grad_(), side, *more)


def linear(x, w, y, items, side):
    return ce(F.linear(x, w) + F.linear(items, side)[:, 0], y)


def transposed(x, w, y, items, side):
    return ce(F.linear(x, w) + F.linear(items, side).t(), y)


def squeezed(x, w, y, items, side):
    hidden = torch.relu(F.linear(items, side.expand(3, 4)))
    return ce(F.linear(x, w) + F.linear(hidden, side[:, :3]).squeeze(-1), y)


def matrix_times_vector(x, w, y, items, side):
    return ce(F.linear(x, w) + items @ side[0], y)


def summed(x, w, y, items, side):
    return ce(F.linear(x, w) + (items * side).sum(1), y)


def cumulative(x, w, y, items, side):
    """What a chunk of outputs could not know, and a second result of the logits."""
    z = F.linear(x, w) * items[:, 0].cumsum(0).sigmoid()
    return ce(z, y) + z.logsumexp(-1).square().mean() + side.sum()


def sorted_prior(x, w, y, items, side):
    prior = items[:, 0].softmax(0).sort().values.log()
    return ce(F.linear(x, w) + prior, y, label_smoothing=0.1) + side.sum()


def written(x, w, y, items, side):
    z = F.linear(x, w)
    added = F.linear(items, side)[:, 0].flip(0)
    added[3:7] = -5.0
    return ce(z + added, y)


VECTORS = [
    linear, transposed, squeezed, matrix_times_vector, summed, cumulative, sorted_prior, written,
]  # fmt: skip


@pytest.mark.parametrize("program", VECTORS)
def test_they_are_computed_before(program):
    assert_same(program, items())


def test_in_a_checkpoint():
    def program(x, w, y, items, side):
        return torch.utils.checkpoint.checkpoint(linear, x, w, y, items, side, use_reentrant=False)

    assert_same(program, items())


def test_two_of_them():
    def program(x, w, y, items, side, b):
        return ce(F.linear(x, w) * items[:, 0].flip(0) + F.linear(items, side).t() + b, y)

    assert_same(program, items(bias()))


def test_what_makes_the_weight_may_be_next_to_it():
    def program(x, w, y, items, side):
        return ce(F.linear(x, w * 2) + F.linear(items, side)[:, 0], y)

    assert_same(program, items())


def test_a_row_of_labels_is_not_made_whole():
    """The vector is made from a matrix of labels, which the program makes in chunks."""

    def program(x, w, i):
        z = F.linear(x, w)
        seen = F.one_hot(i, L).sum(1).sum(0)
        return F.binary_cross_entropy_with_logits(z * seen, F.one_hot(i[:, 0], L).to(z.dtype))

    labels = torch.stack([torch.randperm(L)[:3] for _ in range(N)])
    assert_same(program, (features(), weight(), labels))


def test_a_vector_that_logits_are_written_into():
    def program(x, w, y, items, side):
        z = F.linear(x, w)
        added = F.linear(items, side)[:, 0].detach().flip(0)
        added.copy_(z.detach()[0])
        return ce(z + added, y)

    assert_same(program, items())


def test_the_report_names_the_head():
    assert_same(linear, items())
    (match,) = matches()
    assert (match.num_outputs, match.num_features) == (L, D)
