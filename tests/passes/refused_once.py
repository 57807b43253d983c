"""Programs that a rule of the pass refuses, or refused once, and that run as written."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from programs import (
    D,
    L,
    N,
    classes,
    dense,
    features,
    labels,
    rows,
    weight,
)

ce = F.cross_entropy
bce = F.binary_cross_entropy_with_logits


def dense_rows() -> tuple[Any, ...]:
    return features(), weight(), dense()


def label_rows() -> tuple[Any, ...]:
    return features(), weight(), labels()


def logits_used_twice(x, w, y):
    z = F.linear(x, w)
    return ce(z, y) + z.mean()


def setitem_on_logits(x, w, y):
    z = F.linear(x, w)
    z[:, 0] = -5.0
    return ce(z, y)


def scattered_twice(x, w, i):
    y = torch.zeros(N, L).scatter_(1, i, 1.0)
    return bce(F.linear(x, w), y.scatter_(1, i[:, :1], 0.0))


def ones_written(x, w, i):
    ones = torch.ones(i.shape)
    ones.view(-1)[2] = 0.5
    return bce(F.linear(x, w), torch.zeros(N, L).scatter_(1, i, ones))


def logsumexp_loss(x, w, y):
    z = F.linear(x, w)
    return (z.logsumexp(-1) - z.gather(1, y[:, None])[:, 0]).mean()


def pseudo_labels(x, w):
    z = F.linear(x, w)
    return ce(z, z.detach().argmax(-1))


def dense_target_like_logits(x, w):
    z = F.linear(x, w)
    return bce(z, torch.zeros_like(z) + 0.1)


def scatter_wrong(**how: Any) -> Any:
    value, dim = how.pop("value", 1.0), how.pop("dim", 1)
    return lambda x, w, i: bce(F.linear(x, w), torch.zeros(N, L).scatter_(dim, i, value, **how))


def target_column_written(x, w, i):
    y = F.one_hot(i, L).sum(1).float()
    y[:, 5] = 1.0
    return bce(F.linear(x, w), y)


def dense_column_written(x, w):
    y = torch.ones(N, L)
    y[:, 5] = 0.0
    return bce(F.linear(x, w), y)


ONCE_REFUSED: dict[str, tuple[Any, Any]] = {
    "target_column_written": (target_column_written, label_rows),
    "dense_column_written": (dense_column_written, lambda: rows()[:2]),
    "used_twice": (
        logits_used_twice,
        rows,
    ),
    "like_logits": (
        dense_target_like_logits,
        lambda: rows()[:2],
    ),
    "smoothing": (
        lambda x, w, y: ce(F.linear(x, w), y, label_smoothing=0.1),
        rows,
    ),
    "class_weight": (
        lambda x, w, y, v: ce(F.linear(x, w), y, weight=v),
        lambda: (*rows(), torch.rand(L)),
    ),
    "pos_weight": (
        lambda x, w, y, v: bce(F.linear(x, w), y, pos_weight=v),
        lambda: (*dense_rows(), torch.rand(L)),
    ),
    "bce_weight": (
        lambda x, w, y, v: bce(F.linear(x, w), y, weight=v),
        lambda: (*dense_rows(), torch.rand(L)),
    ),
    "soft_classes": (
        lambda x, w, y: ce(F.linear(x, w), y),
        lambda: (features(), weight(), torch.rand(N, L).softmax(-1)),
    ),
    "no_positives": (
        lambda x, w: bce(F.linear(x, w), torch.zeros(N, L)),
        lambda: rows()[:2],
    ),
    "rounded_logits": (
        lambda x, w, y: ce(F.linear(x, w).bfloat16().float(), y),
        rows,
    ),
    "sum_of_two_products": (
        lambda x, w, v, y: ce(F.linear(x, w) + F.linear(x, v), y),
        lambda: (torch.randn(D).requires_grad_(), weight(), weight(), classes()[0]),
    ),
    "temperature": (
        lambda x, w, y: ce(F.linear(x, w) / 2, y),
        rows,
    ),
    "add_": (
        lambda x, w, y: ce(F.linear(x, w).add_(1.0), y),
        rows,
    ),
    "masked_fill_": (
        lambda x, w, y, m: ce(F.linear(x, w).masked_fill_(m, -5.0), y),
        lambda: (*rows(), dense().bool()),
    ),
    "setitem": (
        setitem_on_logits,
        rows,
    ),
    "scattered_twice": (
        scattered_twice,
        label_rows,
    ),
    "ones_written": (
        ones_written,
        label_rows,
    ),
    "scatter_half": (
        scatter_wrong(value=0.5),
        label_rows,
    ),
    "scatter_rows": (
        scatter_wrong(dim=0),
        lambda: (features(), weight(), torch.randint(0, N, (2, L))),
    ),
    "scatter_few_rows": (
        scatter_wrong(),
        lambda: (features(), weight(), labels()[:4]),
    ),
    "scatter_add_": (
        lambda x, w, i: bce(F.linear(x, w), torch.zeros(N, L).scatter_add_(1, i, torch.ones(N, 3))),
        label_rows,
    ),
    "logsumexp": (
        logsumexp_loss,
        rows,
    ),
    "multi_margin": (
        lambda x, w, y: F.multi_margin_loss(F.linear(x, w), y),
        rows,
    ),
    "mse": (
        lambda x, w, y: F.mse_loss(F.linear(x, w), y),
        dense_rows,
    ),
    "pseudo_labels": (
        pseudo_labels,
        lambda: rows()[:2],
    ),
    "distillation": (
        lambda x, w, v: bce(F.linear(x, w), F.linear(x, v).sigmoid().detach()),
        lambda: (features(), weight(), weight()),
    ),
}
