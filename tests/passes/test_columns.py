"""Outputs that are cut off behind a product: a padded vocabulary, a padding item."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from programs import (
    D,
    L,
    N,
    assert_same,
    bias,
    compiled,
    features,
    matches,
    refusals,
    run,
    weight,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import elmo_compile
from elmo_compile.deferred.tensor import Deferred

ce = F.cross_entropy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def head(*shape):
    """Features, weight, bias and classes below 100."""
    shape = shape or (N,)
    return features(*shape), weight(), bias(), torch.randint(0, 100, shape)


def shifted(x, w, b, y):
    """A language model's, as Megatron pads it."""
    z = F.linear(x, w, b)[:, :-1, : L - 64]
    return ce(z.flatten(0, 1), y[:, 1:].flatten())


def z_loss(x, w, b, y):
    z = F.linear(x, w, b)[:, 1:]
    return ce(z, y) + 1e-3 * z.logsumexp(-1).square().mean()


def targets_cut_too(x, w, b, y):
    z = F.linear(x, w, b)[:, 1:]
    return F.binary_cross_entropy_with_logits(z, F.one_hot(y, L - 1).to(z.dtype))


def in_a_checkpoint(x, w, b, y):
    return checkpoint(lambda x: ce(F.linear(x, w, b)[:, 1:], y), x, use_reentrant=False)


CUTS = {
    "front": lambda x, w, b, y: ce(F.linear(x, w, b)[:, 1:], y),
    "padding": lambda x, w, b, y: ce(F.linear(x, w, b)[..., : L - 64], y),
    "both": lambda x, w, b, y: ce(F.linear(x, w, bias=b)[..., 3:-64], y),
    "no_bias": lambda x, w, b, y: ce(F.linear(x, w)[:, 1:] + b[1:], y),
    "matmul": lambda x, w, b, y: ce((x @ w.t())[:, 1:] + b[0], y),
    "bias_and_scale": lambda x, w, b, y: ce((x @ w.T + b)[:, 1:] / 2, y),
    "scaled": lambda x, w, b, y: ce((3 * F.linear(x, w, b) / 2)[:, 1:], y),
    "mm": lambda x, w, b, y: ce(torch.mm(x, w.transpose(0, 1))[:, 1:] + b[0], y),
    "addmm": lambda x, w, b, y: ce(torch.addmm(b, x, w.t())[:, 1:], y),
    "narrow": lambda x, w, b, y: ce(F.linear(x, w, b).narrow(-1, 0, 150), y),
    "stored_by_features": lambda x, w, b, y: ce((x @ w.t().contiguous())[:, 1:] + b[0], y),
    "z_loss": z_loss,
    "targets": targets_cut_too,
    "checkpoint": in_a_checkpoint,
    "smoothed": lambda x, w, b, y: ce(F.linear(x, w, b)[:, 1:], y, label_smoothing=0.1),
}


@pytest.mark.parametrize("name", CUTS)
def test_the_weight_is_cut_instead(name):
    args = head()
    assert_same(CUTS[name], args)
    assert matches()[0].num_outputs < L
    grad = run(compiled(CUTS[name]), args).grads[1]
    assert not grad[0 if name not in ("padding", "narrow") else -1].any()


def test_rows_are_cut_at_once():
    assert_same(shifted, head(2, 5))


def test_through_a_cast():
    def program(x, w, b, y):
        z = F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).float()
        return ce(z[:, 1:], y)

    def whole(x, w, b, y):
        x, w, b = x.bfloat16(), w.bfloat16(), b.bfloat16()
        return ce(F.linear(x, w[1:], b[1:]).float(), y)

    args = head()
    ours, same = run(compiled(program), args), run(compiled(whole), args)
    assert len(matches()) == 1
    assert torch.equal(ours.loss, same.loss)
    for mine, theirs in zip(ours.grads[:3], same.grads[:3]):
        assert torch.equal(mine, theirs)


def test_two_cuts_of_one_weight():
    def program(x, w, b, y):
        return ce(F.linear(x, w, b)[:, 1:], y) + ce(F.linear(2 * x, w, b)[:, :-3], y)

    assert_same(program, head(), count=2)


def quiet_slice(x, w, b, y):
    z = F.linear(x, w, b)
    with torch.no_grad():
        z = z[:, 1:]
    return ce(z * x.sum(), y)


LEFT = {
    "two_readers": lambda x, w, b, y: (lambda z: ce(z[:, 1:], y) + z.sum())(F.linear(x, w, b)),
    "step": lambda x, w, b, y: ce(F.linear(x, w, b)[:, ::2], y % 50),
    "split": lambda x, w, b, y: ce(F.linear(x, w, b).split(101, -1)[0], y),
    "quiet": quiet_slice,
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left_with_a_true_reason(name):
    args = head()
    ours, eager = run(compiled(LEFT[name]), args), run(LEFT[name], args)
    torch.testing.assert_close(ours.loss, eager.loss)
    for mine, theirs in zip(ours.grads, eager.grads):
        torch.testing.assert_close(mine, theirs)
    (refusal,) = refusals()
    if name != "quiet":
        assert "cut off" in refusal.reason
        assert "F.linear(x, w[a:b], b[a:b])" in refusal.remedy


def test_a_refused_head_keeps_its_product():
    def program(x, w, b, y):
        return F.linear(x, w, b)[:, 1:].sort(-1).values.sum()

    run(compiled(program), head())
    assert len(refusals()) == 1
    assert not matches()
    assert "w[1:]" not in str(refusals()[0])


class Model(nn.Module):
    """An encoder and a head of which the first output is left out."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(8, D)
        self.head = nn.Linear(D, L)

    def forward(self, x, y=None):
        z = self.head(torch.tanh(self.encoder(x)))[:, 1:]
        return z if y is None else ce(z, y)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("options", [{}, {"update_at": "step"}])
def test_training_with_an_owned_head(options, outside):
    theirs = Model()
    ours = copy.deepcopy(theirs)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.5)
    fused = elmo_compile.optim.SGD(ours.parameters(), lr=0.5, **options)
    call = compiled(ours)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            x, y = torch.randn(N, 8), torch.randint(0, 100, (N,))
            loss = ce(call(x), y) if outside else call(x, y)
            loss.backward()
            fused.step()
            fused.zero_grad()
            expected = theirs(x, y)
            expected.backward()
            sgd.step()
            sgd.zero_grad()
            torch.testing.assert_close(loss.detach(), expected.detach())
    assert len(matches()) >= 1, refusals()
    assert "by gradient" in str(elmo_compile.last_report())
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    if not outside:
        assert any("reads a part of the weight's outputs" in str(w.message) for w in said)


def test_a_dynamic_batch():
    model = Model()
    call = compiled(model, dynamic=True)
    for rows in (N, 9):
        x, y = torch.randn(rows, 8), torch.randint(0, 100, (rows,))
        torch.testing.assert_close(call(x, y), model(x, y))
    assert len(matches()) == 1


def test_returned_logits_are_deferred_without_the_cut_output():
    model = Model()
    call = compiled(model)
    x = torch.randn(N, 8)
    z = call(x)
    assert isinstance(z, Deferred)
    assert z.shape == (N, L - 1)
    assert torch.equal(z.argmax(-1), model(x).argmax(-1))
    torch.testing.assert_close(z + 0, model(x))
    with torch.no_grad():
        before = model(x)
        kept = call(x)
        model.head.weight.mul_(2)
    try:
        values = kept + 0
    except elmo_compile.errors.StaleLogitsError:
        return
    torch.testing.assert_close(values, before)


def test_converted_heads_are_refused_with_a_true_reason():
    model = elmo_compile.convert_head(Model(), dtype=torch.bfloat16)
    call = compiled(model)
    x, y = torch.randn(N, 8), torch.randint(0, 100, (N,))
    torch.testing.assert_close(call(x, y), model(x, y), rtol=1e-2, atol=1e-2)
    (refusal,) = refusals()
    assert "cut off" in refusal.reason
