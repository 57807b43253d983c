"""A report tells how often deferred logits were made all the same, where, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.deferred.made import Made

N, L = 6, 100
OPTIONS: dict[str, Any] = {"lower": "eager", "min_outputs": 64}


class Broken(nn.Module):
    """A graph break between head and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, L)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.head(x)
        torch._dynamo.graph_break()
        return F.cross_entropy(z, y)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    elmo.report.clear()
    torch.manual_seed(0)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 8), torch.randint(0, L, (N,))


def told() -> str:
    return " ".join(str(elmo.last_report()).split())


def test_a_later_graph_that_receives_them() -> None:
    run = torch.compile(Broken(), backend="elmo", options=OPTIONS)
    for _ in range(3):
        run(*batch()).backward()
    match = next(m for m in elmo.last_report().matches if m.loss == "linear")
    assert sum(match.made.values()) == 3
    assert "of logits were made all the same, 3 times" in told()
    assert "would hold" in told()
    assert "Dynamo compiled apart received them (remedy: compute the loss in the graph" in told()
    assert "torch._dynamo.graph_break()" in match.graph_break


def test_explain_names_the_line_where_the_graph_ends() -> None:
    report = elmo.explain(Broken(), *batch(), options=OPTIONS)
    text = " ".join(str(report).split())
    assert "unless something makes the logits" in text
    assert "the graph ends between head and loss, at" in text
    assert "test_made.py" in report.matches[0].graph_break


def test_an_operation_that_reads_them() -> None:
    model: Any = torch.compile(nn.Linear(8, L), backend="elmo", options=OPTIONS)
    x, y = batch()
    z = model(x)
    F.cross_entropy(z, y)
    assert z.argmax(-1).shape == (N,)
    assert "made all the same" not in told()
    z.sort()
    z.exp()
    earlier = " ".join(str(elmo.reports()[0]).split())
    assert "made all the same, 1 time:" in earlier
    assert "`sort` read them at" in earlier
    assert "z.sort()" in earlier
    assert "the deferred logits of the head" in told()


def test_an_excluded_head(tmp_path: Any) -> None:
    model = nn.Linear(8, L)
    elmo.exclude(model)
    torch.compile(model, backend="elmo", options=OPTIONS)(batch()[0])
    assert "excluded with elmo_compile.exclude" in told()
    ledger = (elmo.last_report().dump(tmp_path) / "ledger.json").read_text()
    assert "excluded with" in ledger


def test_reasons_are_bounded() -> None:
    made = Made()
    for number in range(100):
        made.count(str(number % 50))
    assert len(made) == 9
    assert sum(made.values()) == 100


def test_label_smoothing_outside_streams() -> None:
    """As transformers writes it: log-probabilities negated, gathered, and summed."""
    head = nn.Linear(8, L)
    model: Any = torch.compile(head, backend="elmo", options=OPTIONS)
    x, y = batch()
    grads = []
    for logits in (model(x), head(x)):
        head.zero_grad()
        loss = -F.log_softmax(logits, dim=-1)
        picked, all_of_them = loss.gather(-1, y[:, None]), loss.sum(-1, dtype=torch.float32)
        (0.9 * picked.mean() + 0.1 * all_of_them.mean() / L).backward()
        assert head.weight.grad is not None
        grads.append(head.weight.grad.clone())
    torch.testing.assert_close(*grads)
    assert not any(match.made for report in elmo.reports() for match in report.matches)


def test_deferred_logits_leave_the_update_to_their_loss() -> None:
    """By gradient or fused is said where it is decided, in the report of the loss."""
    model = nn.Linear(8, L)
    opt = elmo.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    z = torch.compile(model, backend="elmo", options={**OPTIONS, "deferred_logits": True})(x)
    (match,) = elmo.last_report().matches
    assert match.update == "with its loss"
    F.cross_entropy(z, y).backward()
    opt.step()
    (match,) = elmo.last_report().matches
    assert match.update == "in backward"


@pytest.mark.parametrize("rows", [2, 512])
def test_a_head_that_holds_more_than_before_is_told(rows: int) -> None:
    """Few rows have few logits: a chunk's temporaries may be more."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 20_000))
    x, y = torch.randn(rows, 8), torch.randint(0, 20_000, (rows,))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    report = elmo.explain(loss, x, y)
    (memory,) = report.memory
    more = memory.bytes_after > memory.bytes_before
    assert more == (rows == 2)
    assert ("which is more: min_outputs=" in " ".join(str(report).split())) == more


def test_dense_targets_are_told_of_multi_hot() -> None:
    model = nn.Linear(8, L)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x), y)

    dense = elmo.explain(loss, torch.randn(N, 8), torch.rand(N, L), options=OPTIONS)
    assert "the dense targets are as large as the logits" in " ".join(str(dense).split())
