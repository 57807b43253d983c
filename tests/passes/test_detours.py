"""What a loss makes from the logits or the weight and meets again, beside the product itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import (
    D,
    N,
    assert_same,
    classes,
    compiled,
    features,
    matches,
    refusals,
    rows,
    run,
    weight,
)
from torch import nn

import elmo_compile as elmo

ce = F.cross_entropy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


SPELLINGS = {
    "linear": lambda x, w: F.linear(x, w),
    "t": lambda x, w: x @ w.t(),
    "T": lambda x, w: x @ w.T,
    "transpose": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "cast": lambda x, w: F.linear(x, w.double().to(x.dtype)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_distances_keep_the_gradient_of_the_norms(name):
    product = SPELLINGS[name]
    assert_same(lambda x, w, y: ce(2 * product(x, w) - w.pow(2).sum(1), y), rows())


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_weight_read_with_the_logits_is_refused(name):
    product = SPELLINGS[name]

    def program(x, w, y):
        return (product(x, w).softmax(-1) @ w).pow(2).mean()

    assert_same(program, rows(), count=0)
    assert "reads the features or the weight" in refusals()[0].reason


def test_one_row_of_features_read_with_its_logits_is_refused():
    def program(x, w):
        return (F.linear(x, w)[:, None] * x).pow(2).mean()

    assert_same(program, (torch.randn(D).requires_grad_(), weight()), count=0)
    assert "reads the features or the weight" in refusals()[0].reason


def train(optimizer, loss, x, y):
    for _ in range(2):
        loss(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_distances_under_an_optimizer():
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight().detach())

        def forward(self, x, y):
            w = self.weight
            return ce(2 * x @ w.t() - w.pow(2).sum(1), y)

    ours, eager = Distances(), Distances()
    eager.load_state_dict(ours.state_dict())
    x, _, y = rows()
    with pytest.warns(UserWarning, match="reads the weight"):
        train(elmo.optim.SGD(ours.parameters(), lr=0.5), compiled(ours), x, y)
    train(torch.optim.SGD(eager.parameters(), lr=0.5), eager, x, y)
    torch.testing.assert_close(ours.weight, eager.weight)


def hinge(x, w, y):
    z = F.linear(x, w)
    right = z[torch.arange(N), y]
    return F.relu(1 + z - right[:, None]).sum(1).mean()


def log_sum_exp_by_hand(x, w, y):
    z = F.linear(x, w)
    top = z.max(-1, keepdim=True).values.detach() * 1.0
    total = (z - top).exp().sum(-1).log() + top[:, 0]
    return (total - z.gather(1, y[:, None])[:, 0]).mean()


def log_sum_exp_below_a_view(x, w, y):
    z = F.linear(x, w)
    top = z.detach().amax(-1)
    return (top + (z - top.unsqueeze(1)).exp().sum(-1).log()).mean()


def standardised(x, w, y):
    z = F.linear(x, w)
    return ce(z / (z.std(-1, keepdim=True) + 1e-5), y)


def confident_rows(x, w, y):
    z = F.linear(x, w)
    confidence, guess = z.detach().softmax(-1).max(-1)
    return ce(z * (confidence > 0.02).float()[:, None], guess)


def read_on_both_sides(x, w, y):
    z = F.linear(x, w)
    scale = z.logsumexp(-1, keepdim=True) / 8
    return ce(z * scale, y) + scale.sum()


def part_of_a_tuple(x, w, y):
    z = F.linear(x, w)
    best, row = (z.logsumexp(-1, keepdim=True) * 2).max(0)
    return ce(z * best, y) + row.sum()


@pytest.mark.parametrize(
    "program",
    [hinge, log_sum_exp_by_hand, log_sum_exp_below_a_view, standardised, confident_rows,
     read_on_both_sides, part_of_a_tuple],
)  # fmt: skip
def test_small_values_that_meet_the_logits_again(program):
    assert_same(program, rows())


def test_a_parameter_on_the_way_takes_its_gradient():
    def program(x, w, y, gain):
        z = F.linear(x, w)
        return ce(z * torch.sigmoid(z.logsumexp(-1, keepdim=True) * gain + 1), y)

    assert_same(program, (*rows(), torch.tensor(0.3).requires_grad_()))


def test_labels_guessed_by_another_head():
    def program(x, w, other):
        confidence, guess = F.linear(other, w).detach().softmax(-1).max(-1)
        keep = (confidence > 0.02).float()
        return (ce(F.linear(x, w), guess, reduction="none") * keep).mean()

    assert_same(program, (features(), weight(), features().detach()), count=2)


def test_heads_that_need_each_other():
    def program(x, w, v):
        a, b = F.linear(x, w), F.linear(x, v)
        first, second = a.detach().argmax(-1), b.detach().argmax(-1)
        return ce(a, second) + ce(b, first)

    assert_same(program, (features(), weight(), weight()), count=1)
    assert "each made from the other's" in refusals()[0].reason


def test_features_made_from_logits_are_refused():
    def program(x, w, v, y):
        z = F.linear(x, w)
        h = x * z.logsumexp(-1, keepdim=True).tanh()
        return ce(z + F.linear(h, v), y)

    assert_same(program, (features(), weight(), weight(), classes()), count=0)
    assert "features of this head are made from the logits" in refusals()[0].reason


def test_another_head_on_the_way_is_refused():
    def program(x, w, v, y):
        z = F.linear(x, w)
        h = x * z.logsumexp(-1, keepdim=True).tanh()
        return ce(z * F.linear(h, v).logsumexp(-1, keepdim=True), y)

    assert_same(program, (features(), weight(), weight(101), classes()), count=1)
    assert "meets them again" in refusals()[0].reason


@pytest.mark.parametrize(
    "program",
    [lambda x, w: (F.linear(x, w), x.sum())[1], lambda x, w: x.sum() * F.linear(x, w).shape[-1]],
)
def test_logits_nobody_reads(program):
    args = (features(), weight())
    eager, ours = run(program, args), run(compiled(program), args)
    torch.testing.assert_close(ours.loss, eager.loss)
    assert not matches()
    assert "nothing is made" in refusals()[0].reason
