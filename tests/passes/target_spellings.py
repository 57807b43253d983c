"""How a target is written: built in the program, in each form a loss takes, of each dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from programs import (
    L,
    N,
    classes,
    dense,
    features,
    labels,
    weight,
)

import elmo_compile as elmo

ce = F.cross_entropy
bce = F.binary_cross_entropy_with_logits
Program = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def dense_rows() -> tuple[Any, ...]:
    return features(), weight(), dense()


def label_rows() -> tuple[Any, ...]:
    return features(), weight(), labels()


def repeated_labels() -> tuple[Any, ...]:
    return features(), weight(), torch.tensor([[1, 1, 2], [5, 5, 5], [0, 202, 7]] * 2)


def built(make: Callable[[Any], Any]) -> Callable[..., Any]:
    """BCE against targets that the program builds from label indices."""
    return lambda x, w, i: bce(F.linear(x, w), make(i), reduction="sum")


def by_scatter(i):
    y = torch.zeros(N, L)
    y.scatter_(1, i, 1.0)
    return y


def by_scatter_without_grad(i):
    with torch.no_grad():
        return torch.zeros(N, L).scatter_(1, i, 1.0)


def by_setitem(i):
    y = torch.zeros(N, L)
    y[torch.arange(N)[:, None], i] = 1.0
    return y


def put_rows(i):
    return torch.arange(N)[:, None], i


def target_row_written(x, w, i):
    y = torch.zeros(N, L, dtype=x.dtype).scatter_(1, i, 1.0)
    y[0].fill_(0.5)
    return bce(F.linear(x, w), y)


BUILT: dict[str, Program] = {
    "scatter_": (built(by_scatter), label_rows),
    "scatter_repeats": (built(by_scatter), repeated_labels),
    "scatter_no_grad": (built(by_scatter_without_grad), label_rows),
    "scatter": (built(lambda i: torch.zeros(N, L).scatter(1, i, 1)), label_rows),
    "scatter_last_dim": (built(lambda i: torch.zeros(N, L).scatter(-1, i, 1)), label_rows),
    "scatter_ones": (
        built(lambda i: torch.zeros(N, L).scatter_(1, i, torch.ones(i.shape))),
        label_rows,
    ),
    "scatter_ones_like": (
        built(lambda i: torch.zeros(N, L).scatter(1, i, torch.ones_like(i, dtype=torch.float))),
        label_rows,
    ),
    "scatter_ints": (
        built(lambda i: torch.zeros(N, L, dtype=torch.int64).scatter_(1, i, 1).float()),
        label_rows,
    ),
    "scatter_into_full": (built(lambda i: torch.full((N, L), 0.0).scatter_(1, i, 1.0)), label_rows),
    "setitem": (built(by_setitem), label_rows),
    "index_put_": (
        built(lambda i: torch.zeros(N, L).index_put_(put_rows(i), torch.tensor(1.0))),
        label_rows,
    ),
    "one_hot_sum": (built(lambda i: F.one_hot(i, L).sum(1).float()), label_rows),
    "one_hot_sum_repeats": (built(lambda i: F.one_hot(i, L).sum(1).float()), repeated_labels),
    "one_hot_float_sum": (built(lambda i: F.one_hot(i, L).float().sum(dim=1)), repeated_labels),
    "one_hot_clamp": (
        built(lambda i: F.one_hot(i, L).sum(1).clamp(max=1).float()),
        repeated_labels,
    ),
    "one_hot_clamp_both": (
        built(lambda i: F.one_hot(i, L).sum(1).clamp(0, 1).float()),
        repeated_labels,
    ),
    "one_hot_clamp_float": (
        built(lambda i: F.one_hot(i, L).sum(1).float().clamp(max=1.0)),
        repeated_labels,
    ),
    "one_hot_positive": (built(lambda i: (F.one_hot(i, L).sum(1) > 0).float()), repeated_labels),
    "one_hot_bool": (built(lambda i: F.one_hot(i, L).sum(1).bool().float()), repeated_labels),
    "one_hot_amax": (built(lambda i: F.one_hot(i, L).amax(1).float()), repeated_labels),
    "one_hot": (
        built(lambda i: F.one_hot(i, L).float()),
        lambda: (features(), weight(), classes()),
    ),
    "padded": (
        built(lambda i: elmo.multi_hot(i, L)),
        lambda: (features(), weight(), torch.tensor([[1, -1, 1], [-1, -1, -1], [202, 0, 7]] * 2)),
    ),
}

TARGETS: dict[str, Program] = {
    "flat": (
        lambda x, w, i, o: bce(F.linear(x, w), elmo.multi_hot(i, L, offsets=o)),
        lambda: (features(), weight(), classes(7), torch.tensor([0, 2, 2, 3, 7, 7, 7])),
    ),
    "zeros_like_logits": (
        lambda x, w, i: (lambda z: bce(z, torch.zeros_like(z).scatter_(1, i, 1.0)))(F.linear(x, w)),
        label_rows,
    ),
    "dense": (lambda x, w, y: bce(F.linear(x, w), y), dense_rows),
    "dense_soft": (
        lambda x, w, y: bce(F.linear(x, w), y),
        lambda: (features(), weight(), torch.rand(N, L)),
    ),
    "dense_bool": (
        lambda x, w, y: bce(F.linear(x, w), y.to(x.dtype)),
        lambda: (features(), weight(), dense().bool()),
    ),
    "dense_3d": (
        lambda x, w, y: bce(F.linear(x, w), y),
        lambda: (features(2, 3), weight(), dense(2, 3)),
    ),
    "dense_viewed": (
        lambda x, w, y: bce(F.linear(x, w), y.view(2, 3, L)),
        lambda: (features(2, 3), weight(), dense()),
    ),
    "dense_written_before": (target_row_written, label_rows),
    "dense_computed": (lambda x, w, y: bce(F.linear(x, w), y * 0.9 + 0.05), dense_rows),
    "one_hot_smoothed": (
        lambda x, w, i: bce(F.linear(x, w), F.one_hot(i, L).sum(1).to(x.dtype) * 0.9 + 0.05),
        label_rows,
    ),
    "one_hot_values": (
        lambda x, w, i: bce(F.linear(x, w), F.one_hot(i, L).max(1).values.to(x.dtype)),
        label_rows,
    ),
    "count_above_one": (
        lambda x, w, i: bce(F.linear(x, w), (F.one_hot(i, L).sum(1) > 1).to(x.dtype)),
        repeated_labels,
    ),
    "clamped_above_one": (
        lambda x, w, i: bce(F.linear(x, w), F.one_hot(i, L).sum(1).clamp(max=2).to(x.dtype)),
        repeated_labels,
    ),
    "ignored": (
        lambda x, w, y: ce(F.linear(x, w), y),
        lambda: (features(), weight(), torch.tensor([1, -100, 3, -100, 5, 6])),
    ),
    "ignored_in_range": (
        lambda x, w, y: ce(F.linear(x, w), y, ignore_index=7),
        lambda: (features(), weight(), torch.tensor([1, 7, 3, 7, 0, 6])),
    ),
    "ignored_minus_one": (
        lambda x, w, y: ce(F.linear(x, w), y, ignore_index=-1),
        lambda: (features(), weight(), torch.tensor([1, -1, 3, 7, 0, -1])),
    ),
    "all_ignored": (
        lambda x, w, y: ce(F.linear(x, w), y),
        lambda: (features(), weight(), torch.full((N,), -100)),
    ),
    "all_ignored_sum": (
        lambda x, w, y: ce(F.linear(x, w), y, reduction="sum"),
        lambda: (features(), weight(), torch.full((N,), -100)),
    ),
    "no_rows": (
        lambda x, w, y: ce(F.linear(x, w), y, reduction="sum"),
        lambda: (features(0), weight(), classes(0)),
    ),
    "no_rows_mean": (
        lambda x, w, y: bce(F.linear(x, w), y),
        lambda: (features(0), weight(), dense(0)),
    ),
}
