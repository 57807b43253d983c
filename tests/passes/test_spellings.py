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
    features,
    rows,
    targets_left,
    weight,
)
from target_spellings import BUILT, TARGETS, dense_rows

ce = F.cross_entropy
bce = F.binary_cross_entropy_with_logits
Program = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def rows_bias() -> tuple[Any, ...]:
    return features(), weight(), bias(), classes()


def blocks() -> tuple[Any, ...]:
    return features(2, 3), weight(), classes(2, 3)


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
