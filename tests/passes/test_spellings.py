"""Every spelling of a head and its loss is rewritten, and computes what eager computes.

Tests as data: a program, and what to call it with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    dense,
    features,
    labels,
    rows,
    targets_left,
    weight,
)

import elmo_compile as elmo

ce = F.cross_entropy
bce = F.binary_cross_entropy_with_logits
Program = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def rows_bias() -> tuple[Any, ...]:
    return features(), weight(), bias(), classes()


def blocks() -> tuple[Any, ...]:
    return features(2, 3), weight(), classes(2, 3)


def dense_rows() -> tuple[Any, ...]:
    return features(), weight(), dense()


def label_rows() -> tuple[Any, ...]:
    return features(), weight(), labels()


def repeated_labels() -> tuple[Any, ...]:
    return features(), weight(), torch.tensor([[1, 1, 2], [5, 5, 5], [0, 202, 7]] * 2)


def shifted(x, w, ids):
    """A language model's loss: logits of a token against the next token."""
    z = F.linear(x, w)
    return ce(z[..., :-1, :].contiguous().view(-1, L), ids[..., 1:].contiguous().view(-1))


def padded_shift(x, w, ids):
    """Hugging Face's spelling: labels are padded, then shifted."""
    labels = F.pad(ids, (0, 1), value=-100)[..., 1:].contiguous()
    return ce(F.linear(x, w).float().view(-1, L), labels.view(-1), ignore_index=-100)


PRODUCTS: dict[str, Program] = {
    "linear": (lambda x, w, y: ce(F.linear(x, w), y), rows),
    "linear_bias": (lambda x, w, b, y: ce(F.linear(x, w, b), y), rows_bias),
    "linear_keywords": (lambda x, w, b, y: ce(F.linear(input=x, weight=w, bias=b), y), rows_bias),
    "at_t": (lambda x, w, y: ce(x @ w.t(), y), rows),
    "at_T": (lambda x, w, b, y: ce(x @ w.T + b, y), rows_bias),
    "at_mT": (lambda x, w, b, y: ce(b + x @ w.mT, y), rows_bias),
    "torch_t": (lambda x, w, y: ce(torch.matmul(x, torch.t(w)), y), rows),
    "transpose": (lambda x, w, y: ce(x.matmul(w.transpose(0, 1)), y), rows),
    "torch_transpose": (lambda x, w, y: ce(x @ torch.transpose(w, -1, -2), y), rows),
    "permute": (lambda x, w, y: ce(x.mm(w.permute(1, 0)), y), rows),
    "mm": (lambda x, w, y: ce(torch.mm(x, w.t()), y), rows),
    "addmm": (lambda x, w, b, y: ce(torch.addmm(b, x, w.t()), y), rows_bias),
    "addmm_method": (lambda x, w, b, y: ce(b.addmm(x, w.t()), y), rows_bias),
    "einsum": (lambda x, w, y: ce(torch.einsum("nd,ld->nl", x, w), y), rows),
    "einsum_swapped": (lambda x, w, y: ce(torch.einsum("ld, nd -> nl", w, x), y), rows),
    "einsum_transposed": (lambda x, w, y: ce(torch.einsum("nd,dl->nl", x, w.t()), y), rows),
    "einsum_3d": (
        lambda x, w, y: ce(torch.einsum("btd,vd->btv", x, w).flatten(0, 1), y.flatten()),
        blocks,
    ),
    "one_row": (
        lambda x, w, y: ce(F.linear(x, w), y),
        lambda: (torch.randn(D).requires_grad_(), weight(), classes()[0]),
    ),
    "double_transpose_of_square": (
        lambda x, w, y: ce(x @ w.t().t().t(), y),
        lambda: (torch.randn(N, L).requires_grad_(), weight(L, L), classes()),
    ),
    "as_many_rows_as_outputs": (
        lambda x, w, y: ce(F.linear(x, w), y),
        lambda: (features(L), weight(), classes(L)),
    ),
    "features_as_many_as_outputs": (
        lambda x, w, y: ce(F.linear(x, w), y),
        lambda: (torch.randn(N, L).requires_grad_(), weight(L, L), classes()),
    ),
    "strided_weight": (
        lambda x, w, y: ce(F.linear(x, w), y),
        lambda: (features(), torch.randn(D, L).t().requires_grad_(), classes()),
    ),
    "strided_features": (
        lambda x, w, y: ce(F.linear(x.t(), w), y),
        lambda: (torch.randn(D, N).requires_grad_(), weight(), classes()),
    ),
    "scaled_weight": (lambda x, w, y: ce(F.linear(x, w * 0.5), y), rows),
    "normalised_weight": (lambda x, w, y: ce(F.linear(x, F.normalize(w)), y), rows),
    "computed_bias": (lambda x, w, b, y: ce(F.linear(x, w, b * 2), y) + b.sum(), rows_bias),
    "bias_from_weight": (lambda x, w, y: ce(F.linear(x, w, w.sum(1)), y), rows),
    "weight_penalty": (lambda x, w, y: ce(F.linear(x, w), y) + 0.1 * w.pow(2).sum(), rows),
    "dropout_on_features": (lambda x, w, y: ce(F.linear(F.dropout(x, 0.0), w), y), rows),
    "detached_weight": (lambda x, w, y: ce(F.linear(x, w.detach()), y), rows),
    "detached_bias": (lambda x, w, b, y: ce(F.linear(x, w, b.detach()), y), rows_bias),
    "detached_features": (lambda x, w, y: ce(F.linear(x.detach(), w), y), rows),
}

ROWS: dict[str, Program] = {
    "view": (lambda x, w, y: ce(F.linear(x, w).view(-1, L), y.view(-1)), blocks),
    "view_by_size": (
        lambda x, w, y: (lambda z: ce(z.view(-1, z.size(-1)), y.view(-1)))(x @ w.T),
        blocks,
    ),
    "reshape": (lambda x, w, y: ce(F.linear(x, w).reshape(6, -1), y.reshape(6)), blocks),
    "flatten": (lambda x, w, y: ce(F.linear(x, w).flatten(0, -2), y.flatten()), blocks),
    "unsqueeze": (lambda x, w, y: ce(F.linear(x, w)[None].squeeze(0), y), rows),
    "class_dim": (lambda x, w, y: ce(F.linear(x, w).transpose(1, 2), y), blocks),
    "class_dim_permute": (
        lambda x, w, y: ce(F.linear(x, w).permute(0, 2, 1), y, reduction="none").sum(),
        blocks,
    ),
    "class_dim_of_L_positions": (
        lambda x, w, y: ce(F.linear(x, w).transpose(1, 2), y),
        lambda: (features(2, L), weight(), classes(2, L)),
    ),
    "swapped_rows": (
        lambda x, w, y: ce(F.linear(x, w).transpose(0, 1).flatten(0, 1), y.view(-1)),
        blocks,
    ),
    "shifted": (shifted, blocks),
    "padded_shift": (padded_shift, blocks),
    "step_slice": (lambda x, w, y: ce(F.linear(x, w)[1:-1:2], y[1:-1:2]), rows),
    "last_position": (lambda x, w, y: ce(F.linear(x, w)[:, -1], y[:, -1]), blocks),
    "all_outputs_slice": (lambda x, w, y: ce(F.linear(x, w)[..., :], y), rows),
    "index": (
        lambda x, w, y, i: ce(F.linear(x, w)[i], y[i]),
        lambda: (*rows(), torch.tensor([0, 2, 2, 5])),
    ),
    "index_of_position": (
        lambda x, w, y, i: ce(F.linear(x, w)[:, i].flatten(0, 1), y[:, i].flatten()),
        lambda: (*blocks(), torch.tensor([2, 0])),
    ),
    "index_select": (
        lambda x, w, y, i: ce(F.linear(x, w).index_select(0, i), y[i]),
        lambda: (*rows(), torch.tensor([4, 1])),
    ),
}

REDUCTIONS: dict[str, Program] = {
    "ce_sum": (lambda x, w, y: ce(F.linear(x, w), y, reduction="sum"), rows),
    "ce_none": (lambda x, w, y: ce(F.linear(x, w), y, reduction="none"), rows),
    "ce_none_mean": (lambda x, w, y: ce(F.linear(x, w), y, reduction="none").mean(), rows),
    "ce_none_weighted": (
        lambda x, w, y, v: (ce(F.linear(x, w), y, reduction="none") * v).sum() / v.sum(),
        lambda: (*rows(), torch.rand(N)),
    ),
    "ce_none_blocks": (
        lambda x, w, y: ce(F.linear(x, w).mT, y, reduction="none").mean(1),
        blocks,
    ),
    "ce_sum_over_rows": (
        lambda x, w, y: ce(F.linear(x, w), y, reduction="sum") / x.shape[0] * 0.5,
        rows,
    ),
    "int_times": (lambda x, w, y: 3 * ce(F.linear(x, w), y), rows),
    "sum_of_scalar": (lambda x, w, y: ce(F.linear(x, w), y).sum(), rows),
    "mean_of_scalar": (lambda x, w, y: ce(F.linear(x, w), y).mean() / 4, rows),
    "times_tensor": (
        lambda x, w, y, s: ce(F.linear(x, w), y) * s,
        lambda: (*rows(), torch.randn(()).requires_grad_()),
    ),
    "over_tensor": (
        lambda x, w, y, s: ce(F.linear(x, w), y) / s,
        lambda: (*rows(), torch.tensor(1.7, requires_grad=True)),
    ),
    "number_over": (lambda x, w, y: 2 / ce(F.linear(x, w), y), rows),
    "floor_divided": (
        lambda x, w, y: torch.div(
            ce(F.linear(x, w), y, reduction="none"), 2, rounding_mode="floor"
        ),
        lambda: (features().detach(), weight().detach(), classes()),
    ),
    "in_place_tail": (lambda x, w, y: ce(F.linear(x, w), y).mul_(3).add_(1), rows),
    "bce_sum": (lambda x, w, y: bce(F.linear(x, w), y, reduction="sum") / x.shape[0], dense_rows),
    "bce_none_sum": (lambda x, w, y: bce(F.linear(x, w), y, reduction="none").sum(), dense_rows),
    "bce_none_rows": (lambda x, w, y: bce(F.linear(x, w), y, reduction="none").sum(-1), dense_rows),
    "bce_none_sum_mean": (
        lambda x, w, y: bce(F.linear(x, w), y, reduction="none").sum(1).mean(),
        dense_rows,
    ),
    "bce_none_mean": (lambda x, w, y: bce(F.linear(x, w), y, reduction="none").mean(), dense_rows),
    "bce_none_mean_rows": (
        lambda x, w, y: bce(F.linear(x, w), y, reduction="none").mean(dim=1),
        dense_rows,
    ),
}


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

ALL = {**PRODUCTS, **ROWS, **REDUCTIONS, **BUILT, **TARGETS}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ALL)
def test_spelling_is_rewritten_and_right(name):
    program, args = ALL[name]
    assert_same(program, args())
    products = {"aten.linear.default", "aten.matmul.default", "aten.mm.default"}
    assert not targets_left() & products
    if name in BUILT:
        makers = ("scatter", "index_put", "one_hot", "multi_hot", "zeros", "full")
        assert not [target for target in targets_left() if any(word in target for word in makers)]


DYNAMIC = (
    "linear_bias", "at_T", "view_by_size", "shifted", "class_dim", "ce_none_blocks",
    "ce_sum_over_rows", "bce_none_mean", "one_hot_sum", "flat", "dense_3d", "times_tensor",
)  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes(name):
    program, args = ALL[name]
    assert_same(program, args(), dynamic=True)


INDUCTOR = ("linear_bias", "shifted", "ce_none_weighted", "bce_none_sum_mean", "padded")


@pytest.mark.parametrize("name", INDUCTOR)
def test_lowered_by_inductor(name):
    program, args = ALL[name]
    assert_same(program, args(), lower="inductor")


@pytest.mark.parametrize("chunk", [1, 13, 202, 203, 10**6])
@pytest.mark.parametrize("name", ["linear_bias", "padded"])
def test_odd_chunks(name, chunk):
    program, args = ALL[name]
    assert_same(program, args(), chunk_size=chunk)


@pytest.mark.parametrize("shape", [(1, 5, 65), (3, 7, 101), (17, 5, 257), (2, 33, 66)])
def test_odd_shapes(shape):
    rows, columns, outputs = shape
    x = torch.randn(rows, columns).requires_grad_()
    w = torch.randn(outputs, columns).requires_grad_()
    assert_same(lambda x, w, y: ce(x @ w.T, y), (x, w, torch.randint(0, outputs, (rows,))))
    y = (torch.rand(rows, outputs) < 0.1).float()
    assert_same(lambda x, w, y: bce(x @ w.T, y, reduction="sum"), (x, w, y))
