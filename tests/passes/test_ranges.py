"""Ranges of outputs, `z[:, a:b]`, written into or read beside the rest of a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import (
    L,
    N,
    bias,
    classes,
    compiled,
    features,
    matches,
    refusals,
    run,
    weight,
)
from torch import Tensor

import elmo_compile as elmo
from elmo_compile.testing.memory import allocated_peak

INF = float("inf")


def written(write):
    """A loss of logits into which `write(z, few)` wrote; the classes are none of those written."""

    def program(x, w, b, y, few):
        z = F.linear(x, w, b)
        write(z, few)
        return F.cross_entropy(z, y)

    return program


def assign(*where):
    def write(z, few):
        z[where] = few

    return write


def number(value, *where):
    def write(z, few):
        z[where] = value

    return write


def swapped(z, few):
    z[:, :2], z[:, 2:4] = z[:, 2:4].clone(), z[:, :2].clone()


def twice(z, few):
    z[:, -1] = few[0]
    z[:, 5:9][1:] = few[1]
    z[2, 3] = few[2]


def by_its_mean(z, few):
    z[:, 2:5] = z.mean(-1, keepdim=True)


EVERY, ROWS, RANGE = slice(None), slice(1, 4), slice(3, 7)
WRITES = {
    "padding": (number(-INF, ..., slice(L - 9, None)), ()),
    "first": (number(-1e9, EVERY, slice(None, 4)), ()),
    "one": (number(-1e9, EVERY, 0), ()),
    "stepped": (number(-3.0, EVERY, slice(1, 90, 2)), ()),
    "of_rows": (number(0.0, ROWS, slice(-4, None)), ()),
    "of_one_row": (number(0.0, 2, RANGE), ()),
    "nothing": (number(0.0, EVERY, slice(0, 0)), ()),
    "numbers": (assign(EVERY, RANGE), (4,)),
    "scalar": (assign(EVERY, RANGE), ()),
    "a_row_each": (assign(EVERY, RANGE), (N, 1)),
    "all": (assign(EVERY, RANGE), (N, 4)),
    "most": (assign(EVERY, slice(90, None)), (N, 1)),
    "steps": (assign(EVERY, slice(91, None, 20)), (N, 1)),
    "twice": (twice, (3,)),
    "swapped": (swapped, ()),
    "mean": (by_its_mean, ()),
    "fill_": (lambda z, few: z[..., L - 9 :].fill_(-INF), ()),
    "fill_one": (lambda z, few: z[:, 2].fill_(-4.0), ()),
    "zero_": (lambda z, few: z[:, 3:7].zero_(), ()),
    "mul_": (lambda z, few: z[:, 3:7].mul_(few), ()),
    "add_": (lambda z, few: z[:, 3:7].add_(few, alpha=2), (N, 4)),
    "clamp_": (lambda z, few: z[:, 3:7].clamp_(min=0.0), ()),
    "copy_": (lambda z, few: z.narrow(1, 3, 4).copy_(few), (4,)),
    "added": (lambda z, few: z[ROWS, -4:].add_(few), (4,)),
    "unsqueezed": (assign(None, ..., RANGE), (N, 4)),
}


def arguments(*shape: int) -> tuple[Tensor, ...]:
    y = torch.randint(10, 90, (N,)) // 2 * 2
    return features(), weight(), bias(), y, torch.randn(shape).requires_grad_()


def assert_rewritten(program, args, dynamic=None):
    """One head is rewritten, and values and gradients (some of one number) are those of float64."""
    truth = run(program, args, torch.float64)
    ours = run(compiled(program, dynamic=dynamic), args)
    assert len(matches()) == 1, [str(refusal) for refusal in refusals()]
    for mine, exact in zip((ours.loss, *ours.grads), (truth.loss, *truth.grads)):
        assert (mine is None) == (exact is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", WRITES)
def test_written(name):
    write, shape = WRITES[name]
    assert_rewritten(written(write), arguments(*shape))


READS = {
    "scaled": lambda z: z * z[:, :5].mean(-1, keepdim=True),
    "against_one": lambda z: (z - z[:, 2:3]).tanh(),
    "last": lambda z: torch.where(z > z[:, -3:].amax(-1, keepdim=True), 2 * z, z),
    "stepped": lambda z: z * z[:, 1:41:20].mean(-1, keepdim=True),
    "scattered": lambda z: torch.slice_scatter(z, 2 * z[:, 7:9], 1, 3, 5),
    "transposed": lambda z: (z.t() * z.t()[3:9].mean(0)).t(),
    "sequence": lambda z: (lambda s: s * s[..., :5].mean(-1, True))(z.view(2, -1, L)).view(-1, L),
}


@pytest.mark.parametrize("name", READS)
def test_read_beside_the_rest(name):
    def program(x, w, b, y):
        return F.cross_entropy(READS[name](F.linear(x, w, b)), y)

    assert_rewritten(program, (features(), weight(), bias(), classes()))


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_losses_of_what_was_written(dynamic):
    def program(x, w, b, y):
        z = F.linear(x, w, b)
        z[..., L - 9 :] = -50.0
        target = F.one_hot(y, L).to(z.dtype)
        bce = F.binary_cross_entropy_with_logits(z, target)
        return bce + 1e-3 * z.logsumexp(-1).square().mean()

    assert_rewritten(program, arguments()[:4], dynamic=dynamic)


def test_ranks_and_top_k_without_padding():
    def program(x, w, b, y):
        z = F.linear(x, w, b)
        z[:, :3] = -INF
        own = z.gather(-1, y[:, None])
        return z.topk(5).indices, (z > own).sum(-1)

    x, w, b, y, _ = arguments()
    with torch.no_grad():
        b[:3] = 100.0
        for mine, theirs in zip(compiled(program)(x, w, b, y), program(x, w, b, y)):
            assert torch.equal(mine, theirs)
    assert len(matches()) == 1


def test_training_a_fused_head_with_a_padded_vocabulary():
    theirs, ours = torch.nn.Linear(16, L), torch.nn.Linear(16, L)
    ours.load_state_dict(theirs.state_dict())

    def loss(head, x, y):
        z = head(x)
        z[..., L - 9 :] = -INF
        return F.cross_entropy(z, y)

    step = compiled(lambda x, y: loss(ours, x, y))
    fused = elmo.optim.SGD(ours.parameters(), lr=0.5)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for _ in range(3):
        x, y = torch.randn(N, 16), torch.randint(0, L - 9, (N,))
        for optimizer, value in ((fused, step(x, y)), (sgd, loss(theirs, x, y))):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert matches()[0].fused_update
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_nothing_as_large_as_the_logits_is_made():
    rows, outputs = 256, 16384
    x, w = torch.randn(rows, 8), torch.randn(outputs, 8).requires_grad_()
    y = torch.randint(0, 16000, (rows,))

    def program(x, w, y):
        z = F.linear(x, w)
        z[..., 16000:] = -INF
        z[:, :4] *= 2
        return F.cross_entropy(z, y)

    call = compiled(program, chunk_size=256)
    call(x, w, y).backward()
    peak = allocated_peak(lambda: call(x, w, y).backward())
    assert peak < rows * outputs * 4 / 4


LEFT = {
    "many": lambda z: z.mul_(1)[:, 40:].mul_(2),
    "of_a_part": lambda z: z[:, 3:7][1:].fill_(2.0),
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left(name):
    program, args = written(lambda z, few: LEFT[name](z)), arguments()
    ours, eager = run(compiled(program), args), run(program, args)
    assert len(refusals()) == 1
    torch.testing.assert_close(ours.loss, eager.loss)
    for mine, theirs in zip(ours.grads, eager.grads):
        torch.testing.assert_close(mine, theirs)
