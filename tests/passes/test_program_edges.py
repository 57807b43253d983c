"""Masks, indices, infinities and batches at the edge of what a program is made for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import (
    D,
    L,
    N,
    assert_same,
    bias,
    classes,
    compiled,
    features,
    matches,
    refusals,
    rows,
    run,
    weight,
)

ce = F.cross_entropy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def some_outputs():
    return torch.arange(L) % 7 == 5


def other_classes(*shape):
    y = classes(*shape)
    return y - (y % 7 == 5).long()


def columns_masked(x, w, y):
    z = F.linear(x, w)
    z[:, torch.arange(L) % 7 == 5] = -1e4
    return ce(z, y)


def columns_masked_by_argument(x, w, y, mask):
    z = F.linear(x, w)
    z[..., mask] = -torch.inf
    return ce(z.flatten(0, -2), y.flatten())


def elements_masked(x, w, mask):
    z = F.linear(x, w)
    z[mask] = 2.0
    return z.pow(2).mean()


def picked_apart(x, w, y):
    z = F.linear(x, w)
    return (z[torch.arange(len(x)), :, y] * torch.arange(x.shape[1])).sum()


def written_apart(x, w, y):
    z = F.linear(x, w)
    z[torch.arange(len(x)), :, y] = torch.arange(x.shape[1]).to(z.dtype)
    return z.pow(2).sum()


def picked_with_outputs_second(x, w, y):
    z = F.linear(x, w).transpose(1, 2)
    return (z[torch.arange(len(x)), y] * torch.arange(x.shape[1])).sum()


def mask_added_as_numbers(x, w, y, mask):
    return ce(F.linear(x, w) + mask.long() * -100, y)


def mask_added(x, w, y, mask):
    return ce(F.linear(x, w) + mask, y)


def one_row():
    return features(1), weight()


EDGES = {
    "columns_masked": (columns_masked, lambda: (features(), weight(), other_classes())),
    "columns_masked_3d": (
        columns_masked_by_argument,
        lambda: (features(4, 5), weight(), other_classes(4, 5), some_outputs()),
    ),
    "elements_masked": (
        elements_masked,
        lambda: (features(), weight(), torch.rand(N, L) < 0.3),
    ),
    "rows_masked": (elements_masked, lambda: (features(), weight(), torch.rand(N) < 0.5)),
    "picked_apart_square": (picked_apart, lambda: (features(5, 5), weight(), classes(5))),
    "picked_apart": (picked_apart, lambda: (features(4, 5), weight(), classes(4))),
    "written_apart": (written_apart, lambda: (features(4, 5), weight(), classes(4))),
    "outputs_second": (
        picked_with_outputs_second,
        lambda: (features(4, 5), weight(), classes(4)),
    ),
    "mask_added_as_numbers": (mask_added_as_numbers, lambda: (*rows(), bias().detach() < -1)),
    "mask_added": (mask_added, lambda: (*rows(), bias().detach() < 0)),
    "top_of_one_row": (lambda x, w: F.linear(x, w).topk(3).values.sum(), one_row),
    "top_of_a_vector": (
        lambda x, w: F.linear(x, w).topk(3).values.sum(),
        lambda: (torch.randn(D).requires_grad_(), weight()),
    ),
}


def arc_margin(x, w, y):
    cosine = F.linear(F.normalize(x), F.normalize(w)).clamp(-1 + 1e-7, 1 - 1e-7)
    with_margin = torch.cos(torch.acos(cosine) + 0.5)
    return ce(8 * torch.where(F.one_hot(y, L) > 0, with_margin, cosine), y)


def symmetric_cross_entropy(x, w, y):
    z = F.linear(x, w)
    wrong = z.softmax(-1).clamp(1e-7, 1.0)
    return ce(z, y) - (wrong * F.one_hot(y, L).clamp(1e-4, 1.0).log()).sum(-1).mean()


EDGES |= {
    "clamp": (lambda x, w, y: ce(F.linear(x, w).clamp(-0.5, 0.5), y), rows),
    "arc_margin": (arc_margin, rows),
    "symmetric_cross_entropy": (symmetric_cross_entropy, rows),
    "largest": (lambda x, w: F.linear(x, w).max(), lambda: rows()[:2]),
    "nanmean": (lambda x, w: F.linear(x, w).nanmean(), lambda: rows()[:2]),
    "unbind": (lambda x, w: F.linear(x, w).unbind(0)[1].exp().sum(), lambda: rows()[:2]),
    "softshrink": (lambda x, w: F.softshrink(F.linear(x, w)).sum(), lambda: rows()[:2]),
}


def part_by_part(divide):
    """The loss of each part of the rows."""
    return lambda x, w, y: sum(ce(z, t) for z, t in zip(divide(F.linear(x, w)), divide(y)))


def chosen_and_rejected(x, w, y):
    chosen, rejected = F.linear(x, w).log_softmax(-1).chunk(2)
    better = chosen.gather(-1, y[:3, None]) - rejected.gather(-1, y[3:, None])
    return -F.logsigmoid(better).mean()


EDGES |= {
    "split": (part_by_part(lambda t: t.split(4)), rows),
    "split_with_sizes": (part_by_part(lambda t: t.split([1, 2, 3])), rows),
    "chunk": (part_by_part(lambda t: t.chunk(4)), rows),
    "tensor_split": (part_by_part(lambda t: t.tensor_split(4)), rows),
    "second_of_three": (
        lambda x, w: sum(z.logsumexp(-1).mean() for z in F.linear(x, w).split(2, 1)),
        lambda: (features(2, 3), weight()),
    ),
    "chosen_and_rejected": (chosen_and_rejected, rows),
}


def interests():
    """A weight, classes, and several features a row."""
    return features(N, 4), weight(), classes()


def best_interest(x, w, y):
    best = F.linear(x, w).max(1)
    return ce(best.values, y) + (best.indices * best.values).mean()


def best_interest_and_z_loss(x, w, y):
    z = F.linear(x, w).max(-2, keepdim=True)[0][:, 0]
    return ce(z, y) + z.logsumexp(-1).square().mean()


EDGES |= {
    "best_interest": (best_interest, interests),
    "best_interest_and_z_loss": (best_interest_and_z_loss, interests),
    "worst_interest": (lambda x, w, y: ce(F.linear(x, w).min(1).values, y), interests),
    "two_best_interests": (
        lambda x, w, y: ce(F.linear(x, w).topk(2, 1).values.sum(1), y),
        interests,
    ),
    "layer_norm": (lambda x, w, y: ce(F.layer_norm(F.linear(x, w), (L,)), y), rows),
    "layer_norm_with_weight": (
        lambda x, w, y, g, b: ce(F.layer_norm(F.linear(x, w), (L,), g, b, 1e-3), y),
        lambda: (*rows(), bias(), bias()),
    ),
}


def test_equal_interests_have_one_best():
    """The gradient of a maximum goes to the place it names, not to all of that value."""
    x = features(N, 1).detach().expand(N, 4, D).clone().requires_grad_()
    assert_same(best_interest, (x, weight(), classes()))


def test_a_range_of_a_dynamic_number_of_outputs_is_refused():
    def program(x, w, y):
        z = F.linear(x, w)
        z[:, : len(x)] = -5.0
        return ce(z, y % 100 + 50)

    assert_same(program, rows(), count=0, dynamic=True)
    assert "overwritten" in refusals()[0].reason
    assert "masked_fill" in refusals()[0].remedy


def test_parts_of_a_dynamic_number_of_rows():
    assert_same(part_by_part(lambda t: t.chunk(4)), rows(), dynamic=True)


def test_parts_of_the_outputs_are_refused():
    def program(x, w):
        return sum(z.logsumexp(-1).mean() for z in F.linear(x, w).split(101, -1))

    assert_same(program, rows()[:2], count=0)
    assert "cut off" in refusals()[0].reason
    assert "w[a:b]" in refusals()[0].remedy


@pytest.mark.parametrize("name", EDGES)
def test_value_and_gradients(name):
    program, make = EDGES[name]
    assert_same(program, make())


def test_values_written_by_a_mask_are_refused():
    def program(x, w):
        z = F.linear(x, w)
        z[:, torch.arange(L) % 7 == 5] = torch.arange(29).to(z.dtype)
        return z.pow(2).mean()

    assert_same(program, (features(), weight()), count=0)
    assert "index_put" in refusals()[0].reason


@pytest.mark.parametrize("options", [{}, {"chunk_size": None}])
@pytest.mark.parametrize(
    "program",
    [lambda x, w: F.linear(x, w).pow(3).sum(), lambda x, w: F.linear(x, w).logsumexp(-1).sum(),
     lambda x, w: F.linear(x, w).topk(3).values.sum()],
)  # fmt: skip
def test_no_rows(program, options):
    args = features(0), weight()
    ours = run(compiled(program, **options), args)
    assert len(matches()) == 1, refusals()
    assert ours.loss == 0
    assert not ours.grads[1].any()


@pytest.mark.parametrize("large", [0.0, 1e5])
def test_log_sum_exp_of_an_infinite_logit(large):
    added = torch.zeros(L)
    added[100], added[10] = torch.inf, large
    args = (features().detach(), weight().detach(), added)
    ours = run(compiled(lambda x, w, b: (F.linear(x, w) + b).logsumexp(-1)), args)
    assert len(matches()) == 1, refusals()
    assert ours.loss.isposinf().all()


def test_sum_of_losses_as_integers():
    args = (features().detach(), weight().detach(), classes())

    def program(x, w, y):
        return ce(F.linear(x, w), y, reduction="none").sum(dtype=torch.int64)

    assert run(compiled(program), args).loss == run(program, args).loss


def test_traced_under_anomaly_detection():
    def program(x, w, y):
        return ce(F.linear(x, w), y, label_smoothing=0.1)

    with torch.autograd.set_detect_anomaly(True):
        assert_same(program, rows())


SATURATED = {
    "bce": lambda z: F.binary_cross_entropy(torch.sigmoid(z), torch.full_like(z, 0.2)),
    "softplus": F.softplus,
    "mish": F.mish,
    "celu": F.celu,
    "log_ndtr": torch.special.log_ndtr,
}


@pytest.mark.parametrize("name", SATURATED)
def test_gradients_of_large_logits(name):
    args = features(), weight()
    program = lambda x, w: SATURATED[name](100 * F.linear(x, w)).mean()  # noqa: E731
    ours, eager = run(compiled(program), args), run(program, args)
    assert len(matches()) == 1, refusals()
    torch.testing.assert_close(ours.loss, eager.loss)
    for mine, plain in zip(ours.grads, eager.grads):
        assert (mine - plain).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.parametrize("program", [lambda z: z.std(-1).sum(), lambda z: torch.sinc(z).sum()])
def test_gradients_of_equal_logits(program):
    args = features(), torch.zeros(L, D).requires_grad_()
    ours = run(compiled(lambda x, w: program(F.linear(x, w))), args)
    assert len(matches()) == 1, refusals()
    assert all(not grad.any() for grad in ours.grads)


@pytest.mark.parametrize("grad", [False, True])
def test_programs_that_differ_in_the_shape_of_an_argument_alone(grad):
    """A number, one number a row, one an output: cut otherwise, and used in turns."""
    torch._dynamo.reset()
    head = torch.nn.Linear(8, 320)
    scales = [torch.tensor(0.5), torch.rand(6, 1), torch.rand(320), torch.rand(1, 320)]

    def scaled():
        return lambda x, scale: (head(x) * scale).exp().sum(-1)

    def gradient(result):
        head.weight.grad = None
        result.sum().backward()
        return head.weight.grad

    options = {"min_outputs": 64, "chunk_size": 77, "lower": "eager"}
    made = [torch.compile(scaled(), backend="elmo", options=options) for _ in scales]
    x = torch.randn(6, 8)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            for function, scale in zip(made, scales):
                got, expected = function(x, scale), scaled()(x, scale)
                torch.testing.assert_close(got, expected)
                if grad:
                    torch.testing.assert_close(gradient(got), gradient(expected))


def test_a_detached_value_that_is_used_and_returned_has_no_gradient():
    """What is logged would hold the graph of its step."""

    def program(x, w, y):
        z = F.linear(x, w)
        top = z.amax(-1, keepdim=True).detach()
        shown = (top * 2).squeeze(-1)
        return (z - top).exp().sum(-1).log().mean() + ce(z, y), top, shown

    x, w, y = rows()
    loss, top, shown = compiled(program)(x, w, y)
    assert matches()
    assert not any(value.requires_grad for value in (top, shown))
    assert torch.equal(shown, top.squeeze(-1) * 2)
    torch.testing.assert_close(top, F.linear(x, w).amax(-1, keepdim=True))
    loss.backward()
    other = w.detach().clone().requires_grad_()
    program(x.detach(), other, y)[0].backward()
    torch.testing.assert_close(w.grad, other.grad, rtol=1e-4, atol=1e-6)
