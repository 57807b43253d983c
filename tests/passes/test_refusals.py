"""What is not understood is left exactly as it was, and the report says where, why and what to do.

Each program carries the code it is refused with, and a fragment of the line that is blamed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import (
    D,
    L,
    N,
    assert_identical,
    assert_same,
    bias,
    classes,
    compiled,
    dense,
    features,
    labels,
    matches,
    refusals,
    run,
    weight,
)
from torch.utils.checkpoint import checkpoint

import elmo_compile as elmo
from elmo_compile.report import store
from elmo_compile.report.records import Code

ce = F.cross_entropy
bce = F.binary_cross_entropy_with_logits


def rows() -> tuple[Any, ...]:
    return features(), weight(), classes()


def rows_bias() -> tuple[Any, ...]:
    return features(), weight(), bias(), classes()


def dense_rows() -> tuple[Any, ...]:
    return features(), weight(), dense()


def label_rows() -> tuple[Any, ...]:
    return features(), weight(), labels()


def square() -> tuple[Any, ...]:
    return torch.randn(N, L).requires_grad_(), weight(L, L), classes()


def no_grad_rows() -> tuple[Any, ...]:
    return features().detach(), weight().detach(), classes()


def view_of_logits_written(x, w, y):
    z = F.linear(x, w)
    z.view(-1)[3:4].mul_(3.0)
    return ce(z, y)


def part_of_a_part_written(x, w, y):
    z = F.linear(x, w)
    part = z[:, 1:3]
    part[0].fill_(3.0)
    return ce(z, y)


def no_grad_product(x, w, y):
    with torch.no_grad():
        z = F.linear(x, w)
    return ce(z + x.sum() * 0, y)


def features_written(x, w, y):
    z = F.linear(x, w)
    x.add_(1.0)
    return ce(z, y)


def view_of_features_written(x, w, y):
    view = x.view(-1)
    z = F.linear(x, w)
    view.mul_(0.5)
    return ce(z, y)


def weight_written(x, w, y):
    z = F.linear(x, w)
    w.mul_(0.5)
    return ce(z, y)


def relu_in_place(x, w, y):
    z = F.linear(x, w)
    F.relu(x, inplace=True)
    return ce(z, y)


def out_argument(x, w, y):
    z = F.linear(x, w)
    torch.add(x, 1.0, out=x)
    return ce(z, y)


def labels_written(x, w, i):
    y = F.one_hot(i, L).sum(1).float()
    z = F.linear(x, w)
    i.add_(1).remainder_(L)
    return bce(z, y)


def checkpointed_product(x, w, y):
    z = checkpoint(lambda x: F.linear(torch.tanh(x), w), x, use_reentrant=False)
    return ce(z, y)


def random_target(x, w, y):
    return bce(F.linear(x, w), y * torch.bernoulli(torch.full_like(y, 0.5)))


def scatter_wrong(**how: Any) -> Any:
    value, dim = how.pop("value", 1.0), how.pop("dim", 1)
    return lambda x, w, i: bce(F.linear(x, w), torch.zeros(N, L).scatter_(dim, i, value, **how))


REFUSED: dict[str, tuple[Any, Any, Code, str]] = {
    "returned": (lambda x, w: F.linear(x, w), lambda: rows()[:2], Code.LOGITS_ESCAPE, "F.linear"),
    "checkpointed_product": (checkpointed_product, rows, Code.LOGITS_ESCAPE, "F.linear"),
    "target_gradient": (
        lambda x, w, y: bce(F.linear(x, w), y),
        lambda: (features(), weight(), torch.rand(N, L).requires_grad_()),
        Code.UNKNOWN_LOSS,
        "bce(",
    ),
    "random_target": (random_target, dense_rows, Code.UNKNOWN_LOSS, "bernoulli"),
    "elements_kept": (
        lambda x, w, y: bce(F.linear(x, w), y, reduction="none"),
        dense_rows,
        Code.LOGITS_ESCAPE,
        "bce(",
    ),
    "sliced_outputs": (
        lambda x, w, y: ce(F.linear(x, w)[:, ::2], y % 100),
        rows,
        Code.UNKNOWN_LOSS,
        "[:, ::2]",
    ),
    "permuted_outputs": (
        lambda x, w, y: ce(F.linear(x, w)[:, torch.arange(L).flip(0)], y),
        rows,
        Code.UNKNOWN_LOSS,
        "flip(0)",
    ),
    "flipped": (lambda x, w, y: ce(F.linear(x, w).flip(1), y), rows, Code.UNKNOWN_LOSS, "flip(1)"),
    "mixed_view": (
        lambda x, w, y: ce(F.linear(x, w).view(L, N).t(), y),
        rows,
        Code.UNKNOWN_LOSS,
        "view(L, N)",
    ),
    "transposed_square_logits": (
        lambda x, w, y: ce(F.linear(x, w).t(), y),
        lambda: (features(L), weight(), classes(L)),
        Code.UNKNOWN_LOSS,
        ".t(), y)",
    ),
    "classes_elsewhere": (
        lambda x, w, y: ce(F.linear(x, w), y),
        lambda: (features(2, 5), weight(), torch.randint(0, 5, (2, L))),
        Code.UNKNOWN_LOSS,
        "ce(",
    ),
    "stored_by_features_and_sorted": (
        lambda x, w: (x @ w).sort(-1).values[:, :3].sum(),
        lambda: (features(), weight(D, L)),
        Code.WEIGHT_COMPUTED,
        "x @ w",
    ),
    "square_untransposed": (lambda x, w, y: ce(x @ w, y), square, Code.WEIGHT_COMPUTED, "x @ w"),
    "square_twice": (
        lambda x, w, y: ce(x @ w.t().t(), y),
        square,
        Code.WEIGHT_COMPUTED,
        "w.t().t()",
    ),
    "square_linear_t": (
        lambda x, w, y: ce(F.linear(x, w.t()), y),
        square,
        Code.WEIGHT_COMPUTED,
        "w.t()",
    ),
    "einsum_diagonal": (
        lambda x, w, y: ce(torch.einsum("nl,ll->nl", x, w), y),
        square,
        Code.WEIGHT_COMPUTED,
        "einsum",
    ),
    "quantized_weight": (
        lambda x, w, y: ce(F.linear(x, w.to(torch.float8_e4m3fn).float()), y),
        rows,
        Code.WEIGHT_COMPUTED,
        "float8",
    ),
    "rounded_weight": (
        lambda x, w, y: ce(F.linear(x, w.bfloat16().float()), y),
        rows,
        Code.WEIGHT_COMPUTED,
        "bfloat16",
    ),
    "scaled_product": (
        lambda x, w, b, y: ce(torch.addmm(b, x, w.t(), beta=0.5), y),
        rows_bias,
        Code.UNKNOWN_LOSS,
        "beta=0.5",
    ),
    "bias_matrix": (
        lambda x, w, b, y: ce(torch.addmm(b, x, w.t()), y),
        lambda: (features(), weight(), torch.randn(N, L), classes()),
        Code.UNSUPPORTED_SHAPE,
        "addmm",
    ),
    "dropout_on_logits": (
        lambda x, w, y: ce(F.dropout(F.linear(x, w), 0.5), y),
        rows,
        Code.UNKNOWN_LOSS,
        "dropout",
    ),
    "view_written": (view_of_logits_written, rows, Code.UNKNOWN_LOSS, "z.view(-1)"),
    "part_of_a_part": (part_of_a_part_written, rows, Code.MUTATION, "part[0].fill_"),
    "grad_switched": (no_grad_product, rows, Code.UNKNOWN_LOSS, "F.linear"),
    "features_written": (features_written, no_grad_rows, Code.MUTATION, "x.add_"),
    "features_view_written": (view_of_features_written, no_grad_rows, Code.MUTATION, "view.mul_"),
    "weight_written": (weight_written, no_grad_rows, Code.MUTATION, "w.mul_"),
    "relu_in_place": (relu_in_place, no_grad_rows, Code.MUTATION, "F.relu"),
    "out_argument": (out_argument, no_grad_rows, Code.MUTATION, "torch.add"),
    "labels_written": (labels_written, label_rows, Code.MUTATION, "i.add_"),
    "scatter_reduce": (scatter_wrong(reduce="add"), label_rows, Code.UNKNOWN_LOSS, "scatter_"),
    "scatter_rows": (
        scatter_wrong(dim=0),
        lambda: (features(), weight(), torch.randint(0, N, (2, L - 1))),
        Code.UNKNOWN_LOSS,
        "scatter_",
    ),
    "functorch": (
        lambda x, w, y: torch.func.grad(lambda w: ce(F.linear(x, w), y))(w).sum(),
        no_grad_rows,
        Code.UNKNOWN_LOSS,
        "F.linear",
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_untouched(name):
    program, make, code, blamed = REFUSED[name]
    args = make()
    eager = run(program, args)
    ours = run(compiled(program, deferred_logits=name != "returned"), args)
    assert_identical(ours, eager)
    assert not matches()
    (report,) = store.reports()
    assert report.graph_after.code == report.graph_before.code
    (refusal,) = refusals()
    text = str(refusal)
    assert refusal.code == code, text
    file, _, line = refusal.source.partition(":")
    assert Path(file) == Path(__file__), text
    assert blamed in _statement(int(line.split(":")[0])), text
    assert refusal.node, text
    assert len(refusal.reason) > 10, text
    assert len(refusal.remedy) > 10, text


def _statement(line: int) -> str:
    """The line, and those after it that a formatter may have broken it into."""
    return "\n".join(Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1 : line + 3])


@pytest.mark.parametrize("name", ["returned", "flipped", "features_written"])
def test_strict_raises_the_same_text(name):
    program, make, _, _ = REFUSED[name]
    args = make()
    options = {"deferred_logits": name != "returned"}
    run(compiled(program, **options), args)
    (refusal,) = refusals()
    with pytest.raises(elmo.NotRewritten) as caught:
        run(compiled(program, strict=True, **options), args)
    assert str(refusal) in str(caught.value)


def test_strict_is_silent_where_everything_is_rewritten():
    run(compiled(lambda x, w, y: ce(F.linear(x, w), y), strict=True), rows())
    assert len(matches()) == 1


def test_small_heads_are_no_candidates():
    run(compiled(lambda x, w, y: ce(F.linear(x, w), y), min_outputs=L + 1, strict=True), rows())
    assert not matches()
    assert not refusals()


def test_gram_matrix_is_right():
    args = (weight(L, L), classes(L))
    assert_same(lambda w, y: ce(F.linear(w, w), y), args, count=0)


def test_one_head_refused_another_rewritten():
    args = (features(), weight(), weight(), classes())
    program = lambda x, w, v, y: ce(F.linear(x, w), y) + ce(F.linear(x, v).flip(-1), y)  # noqa: E731
    assert_same(program, args)
    assert [refusal.code for refusal in refusals()] == [Code.UNKNOWN_LOSS]


def test_labels_of_another_batch_size_are_not_assumed():
    """Under dynamic shapes `scatter_` accepts fewer rows of labels than targets."""

    def program(x, w, i):
        return bce(F.linear(x, w), torch.zeros(x.shape[0], L).scatter_(1, i, 1.0))

    call = compiled(program, dynamic=True)
    for n in (N, N + 2):
        args = (features(n), weight(), labels())
        torch.testing.assert_close(run(call, args).loss, run(program, args).loss)


def test_dynamic_weight():
    """A weight that is an ordinary argument may change size between calls."""

    def program(x, w, y):
        return ce(F.linear(x, w).view(-1, w.shape[0]), y)

    call = compiled(program, dynamic=True)
    for outputs, columns in ((L, D), (L + 30, D + 3)):
        args = (torch.randn(9, columns), torch.randn(outputs, columns), classes(9))
        torch.testing.assert_close(run(call, args).loss, run(program, args).loss)
