"""Losses without a rule of their own: traced, differentiated and evaluated chunk by chunk.

Every program is compared with eager and with float64; the number of products it takes in a step is
part of what is promised.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import (
    D,
    L,
    assert_same,
    bias,
    classes,
    compiled,
    features,
    matches,
    rows,
    run,
    weight,
)
from refused_once import ONCE_REFUSED, dense_rows, label_rows

import elmo_compile as elmo

ce = F.cross_entropy
bce = F.binary_cross_entropy_with_logits


def focal(x, w, y):
    z = F.linear(x, w)
    p = torch.sigmoid(z)
    right = p * y + (1 - p) * (1 - y)
    return (0.25 * bce(z, y, reduction="none") * (1 - right.detach()) ** 2).sum() / len(x)


def asymmetric(x, w, y):
    p = torch.sigmoid(F.linear(x, w))
    low = (p - 0.05).clamp(min=0)
    return -(y * torch.log(p + 1e-8) + (1 - y) * low**4 * torch.log(1 - low + 1e-8)).sum()


def decoupled_softmax(x, w, y):
    z, positive = F.linear(x, w), y > 0
    negatives = z.masked_fill(positive, -torch.inf).logsumexp(-1, keepdim=True)
    each = torch.where(positive, torch.logaddexp(z, negatives) - z, 0.0)
    return (each.sum(-1) / positive.sum(-1).clamp(min=1)).mean()


def margin_on_target(x, w, y):
    """An invented margin loss."""
    z = F.linear(x, w)
    rival = z.scatter(1, y[:, None], -torch.inf).amax(-1)
    return F.softplus(0.2 + rival - z.gather(1, y[:, None])[:, 0]).mean()


def arc_margin(x, w, y):
    z = F.linear(F.normalize(x), w)
    return ce(8 * torch.where(F.one_hot(y, L) > 0, z - 0.3, z), y)


def weighted_tokens(x, w, y):
    keep = (y % 3 > 0).float()
    return (ce(F.linear(x, w), y, reduction="none") * keep).sum() / keep.sum()


def items_in_batch(x, w, y):
    return ce(F.linear(x, w), y, reduction="sum", ignore_index=5) / (y != 5).sum()


def z_loss(x, w, y):
    z = F.linear(x, w)
    return ce(z, y) + 1e-3 * (z.logsumexp(-1) ** 2).mean()


def low_rank(x, w, a, b, y):
    return ce(F.linear(x, w) + 0.5 * F.linear(F.linear(x, a), b), y)


def jensen_shannon(x, w, v):
    p, q = F.linear(x, w).log_softmax(-1), F.linear(x, v).log_softmax(-1)
    m = torch.logaddexp(p, q) - 0.6931471805599453
    return 0.5 * ((p.exp() * (p - m)).sum() + (q.exp() * (q - m)).sum())


def kl_of_heads(x, w, v):
    teacher = F.linear(x, v).detach().log_softmax(-1)
    student = F.linear(x, w).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def two_heads() -> tuple[Any, ...]:
    return features(), weight(), weight()


def scale_rows() -> tuple[Any, ...]:
    return features(), weight(), torch.zeros(()).requires_grad_(), classes()


PROGRAMS: dict[str, tuple[Any, Any]] = {
    **ONCE_REFUSED,
    "focal": (focal, dense_rows),
    "asymmetric": (asymmetric, dense_rows),
    "decoupled_softmax": (decoupled_softmax, dense_rows),
    "margin_on_target": (margin_on_target, rows),
    "arc_margin": (arc_margin, rows),
    "weighted_tokens": (weighted_tokens, rows),
    "items_in_batch": (items_in_batch, rows),
    "learned_scale": (lambda x, w, t, y: ce(F.linear(x, w) * t.exp(), y), scale_rows),
    "z_loss": (z_loss, rows),
    "softcap": (lambda x, w, y: ce(3 * torch.tanh(F.linear(x, w) / 3), y), rows),
    "low_rank": (
        low_rank,
        lambda: (features(), weight(), weight(4), weight(L, 4), classes()),
    ),
    "log_probability": (
        lambda x, w, y: F.log_softmax(F.linear(x, w), -1).gather(1, y[:, None]).sum(),
        rows,
    ),
    "jensen_shannon": (jensen_shannon, two_heads),
    "kl_of_heads": (kl_of_heads, two_heads),
    "soft_margin": (lambda x, w, y: F.soft_margin_loss(F.linear(x, w), 2 * y - 1), dense_rows),
    "multilabel_soft_margin": (
        lambda x, w, y: F.multilabel_soft_margin_loss(F.linear(x, w), y),
        dense_rows,
    ),
    "poisson": (lambda x, w, y: F.poisson_nll_loss(F.linear(x, w), y), dense_rows),
    "huber": (lambda x, w, y: F.smooth_l1_loss(F.linear(x, w), y), dense_rows),
    "squared_hinge": (
        lambda x, w, y: (1 - (2 * y - 1) * F.linear(x, w)).clamp(min=0).pow(2).sum(-1).mean(),
        dense_rows,
    ),
    "sigmoid_then_bce": (
        lambda x, w, y: F.binary_cross_entropy(F.linear(x, w).sigmoid(), y),
        dense_rows,
    ),
    "nll": (lambda x, w, y: F.nll_loss(F.log_softmax(F.linear(x, w), -1), y), rows),
    "sequence": (
        lambda x, w, y: ce(
            F.linear(x, w)[:, :-1].reshape(-1, L), y[:, 1:].reshape(-1), label_smoothing=0.1
        ),
        lambda: (features(2, 5), weight(), classes(2, 5)),
    ),
    "with_bias": (
        lambda x, w, b, y: ce(F.linear(x, w, b), y, label_smoothing=0.2),
        lambda: (features(), weight(), bias(), classes()),
    ),
    "standardised": (
        lambda x, w, y: ce((z := F.linear(x, w)) / z.std(-1, keepdim=True), y),
        rows,
    ),
    "sigmoid_of_multi_hot": (
        lambda x, w, i: (F.linear(x, w).sigmoid() - elmo.multi_hot(i, L)).pow(2).sum(),
        label_rows,
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_value_and_gradients(name):
    program, make = PROGRAMS[name]
    assert_same(program, make())


@pytest.mark.parametrize("name", ["smoothing", "focal", "z_loss", "sequence", "scatter_half"])
@pytest.mark.parametrize("chunk_size", [1, 16, 10 * L])
def test_any_chunk(name, chunk_size):
    program, make = PROGRAMS[name]
    assert_same(program, make(), chunk_size=chunk_size)


@pytest.mark.parametrize(
    "name", ["smoothing", "focal", "decoupled_softmax", "class_weight", "sequence", "mse"]
)
def test_dynamic_rows(name):
    program, make = PROGRAMS[name]
    assert_same(program, make(), dynamic=True)


@pytest.mark.parametrize(
    ("name", "products"),
    [("smoothing", 4), ("z_loss", 4), ("softcap", 4), ("focal", 4), ("logsumexp", 4), ("nll", 4),
     ("temperature", 4), ("mse", 4), ("weighted_tokens", 4), ("multi_margin", 6)],
)  # fmt: skip
def test_products_of_a_step(name, products):
    """A forward's reductions are made in one pass where none depends on another."""
    program, make = PROGRAMS[name]
    run(compiled(program), make())
    (match,) = matches()
    assert match.products == products


@pytest.mark.parametrize(
    ("name", "loss"),
    [("smoothing", "cross_entropy"), ("multi_margin", "multi_margin_loss"), ("mse", "mse_loss"),
     ("kl_of_heads", "kl_div"), ("asymmetric", "separable"), ("logsumexp", "row_wise"),
     ("pos_weight", "binary_cross_entropy_with_logits")],
)  # fmt: skip
def test_name_of_the_loss(name, loss):
    program, make = PROGRAMS[name]
    run(compiled(program), make())
    (match,) = matches()
    assert match.loss == loss


def test_labels_out_of_range():
    program, make = PROGRAMS["smoothing"]
    x, w, y = make()
    with pytest.raises(elmo.ElmoError, match=f"{L + 3}"):
        compiled(program)(x, w, y + L + 3 - y.max())


def test_through_inductor():
    program, make = PROGRAMS["focal"]
    assert_same(program, make(), lower="inductor")


def test_compiled_chunks():
    """Large enough that the chunk graphs are compiled."""
    big = 20_000

    def program(x, w, y):
        z = F.linear(x, w)
        return ce(z, y, label_smoothing=0.1) + 1e-3 * (z.logsumexp(-1) ** 2).mean()

    args = (torch.randn(64, D).requires_grad_(), weight(big), torch.randint(0, big, (64,)))
    assert_same(program, args, min_outputs=1024, chunk_size=3000)
