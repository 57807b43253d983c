"""`explain` says what the backend would do and changes nothing."""

from __future__ import annotations

import copy
import random
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import elmo_compile as elmo
from elmo_compile.backend import elmo_backend

SMALL = {"lower": "eager", "min_outputs": 64}
NO_CANDIDATE = {"lower": "eager", "min_outputs": 10**6}
OPTIMIZERS = {
    "torch": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "elmo": lambda p: elmo.optim.SGD(p, lr=0.1),
}


class Model(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 100)
        self.broken = broken

    def forward(self, x, y):
        x = F.dropout(self.norm(self.encoder(x)), 0.5)
        if self.broken:
            torch._dynamo.graph_break()
        return F.cross_entropy(self.head(x), y)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def batch():
    return torch.randn(6, 8), torch.randint(0, 100, (6,))


def state(model, optimizer):
    """Everything a training step may change."""
    grads = [parameter.grad for parameter in model.parameters()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), grads, generators))


def assert_same_state(before, after):
    for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("options", [SMALL, NO_CANDIDATE], ids=["head", "no_head"])
@pytest.mark.parametrize("broken", [False, True], ids=["one_graph", "graph_break"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_changes(optimizer, broken, options):
    model, (x, y) = Model(broken), batch()
    opt = OPTIMIZERS[optimizer](model.parameters())

    def step(x, y):
        opt.zero_grad()
        loss = model(x, y)
        loss.backward()
        opt.step()
        return loss

    expected = int(options is SMALL)
    for fn in (model, step, torch.compile(model, backend="elmo", options=SMALL)):
        before = state(model, opt)
        report = elmo.explain(fn, x, y, options=options)
        assert len(report.matches) == expected
        assert_same_state(before, state(model, opt))


def test_weights_written_before_a_graph_break_are_restored():
    w = nn.Parameter(torch.randn(100, 8))
    before = w.detach().clone()

    def step(x, y):
        with torch.no_grad():
            w.mul_(0.5)
        torch._dynamo.graph_break()
        return F.cross_entropy(F.linear(x, w), y)

    assert len(elmo.explain(step, *batch(), options=SMALL).matches) == 1
    assert torch.equal(w, before)


def test_logits_that_would_not_fit():
    """10 million outputs and 16384 rows: 655 GB of logits."""
    w = torch.zeros(10_000_000, 1, requires_grad=True)
    x, y = torch.zeros(16384, 1), torch.zeros(16384, dtype=torch.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = elmo.explain(lambda x, y: F.cross_entropy(F.linear(x, w), y), x, y)
    assert len(report.matches) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def test_refused_logits_that_would_not_fit():
    w = torch.zeros(10_000_000, 1, requires_grad=True)
    x = torch.zeros(16384, 1)
    report = elmo.explain(lambda x: F.linear(x, w), x, options={"deferred_logits": False})
    assert len(report.refusals) == 1
    (match,) = elmo.explain(lambda x: F.linear(x, w), x).matches
    assert (match.loss, match.deferred) == ("linear", True)


def test_compiled_model_goes_on_as_it_was():
    """Explaining between steps costs no compilation, then or later."""
    count = 0

    def counting(gm, inputs):
        nonlocal count
        count += 1
        return elmo_backend(gm, inputs, options=SMALL)

    model, (x, y) = Model().eval(), batch()
    step = torch.compile(model, backend=counting)
    torch.manual_seed(1)
    first = step(x, y)
    torch.manual_seed(1)
    for chunk in range(1, 12):  # More than Dynamo's recompile limit.
        report = elmo.explain(step, x, y, options={**SMALL, "chunk_size": chunk})
        assert report.matches[0].chunk_size == chunk
    assert torch.equal(step(x, y), first)
    assert count == 1

    def later(x, y):
        return model(x, y) * 2

    for _ in range(12):
        elmo.explain(later, x, y, options=SMALL)
    torch.compile(later, backend=counting)(x, y)
    assert count == 2


def test_model_compiled_in_place():
    model = Model()
    model.compile(backend="elmo", options=SMALL)
    assert len(elmo.explain(model, *batch(), options=SMALL).matches) == 1


def test_errors_of_the_function_and_of_options_are_raised():
    with pytest.raises(elmo.OptionError, match="min_outputs"):
        elmo.explain(Model(), *batch(), options={"min_output": 3})

    def wrong(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        elmo.explain(wrong, torch.ones(1))
    loss = torch.ones((), requires_grad=True)
    loss.backward()  # Training works again afterwards.
    assert loss.grad is not None


def test_assert_rewritten():
    args = batch()
    report = elmo.testing.assert_rewritten(
        Model(), *args, loss="cross_entropy", fused_update=False, options=SMALL
    )
    assert report.matches[0].num_outputs == 100
    with pytest.raises(AssertionError, match="expected 2"):
        elmo.testing.assert_rewritten(Model(), *args, loss="cross_entropy", count=2, options=SMALL)
    with pytest.raises(AssertionError, match="fused_update=True"):
        elmo.testing.assert_rewritten(
            Model(), *args, loss="cross_entropy", fused_update=True, options=SMALL
        )


@pytest.mark.parametrize("broken", [False, True], ids=["one_graph", "graph_break"])
def test_the_largest_layer_is_told_where_all_are_too_small(broken):
    model = Model(broken)
    told = "the largest linear layer has 100 outputs, below min_outputs=1000000"
    assert told in str(elmo.explain(model, *batch(), options=NO_CANDIDATE))
    torch.compile(model, backend="elmo", options=NO_CANDIDATE)(*batch())
    assert told in str(elmo.last_report())
    assert "below min_outputs" not in str(elmo.explain(model, *batch(), options=SMALL))
    other = elmo.explain(lambda x: x.relu(), batch()[0], options=NO_CANDIDATE)
    assert "below min_outputs" not in str(other)


class Recurrent(nn.Module):
    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8)
        self.head = nn.Linear(8, 100)
        self.apart = apart

    @torch.compiler.disable
    def encode(self, x):
        return self.rnn(x)[0]

    def forward(self, x, y):
        features = self.encode(x) if self.apart else self.rnn(x)[0]
        return F.cross_entropy(self.head(features), y)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15), reason="Dynamo traces RNNs there"
)
@pytest.mark.parametrize("where", ["module", "function"])
def test_a_skipped_function_is_told_with_its_remedies(where):
    model = Recurrent(apart=False)
    fn = model if where == "module" else lambda x, y: model(x, y) * 2
    report = elmo.explain(fn, *batch(), options=SMALL)
    text = " ".join(str(report).split())
    if where == "module":
        assert not report.sections
        assert "Dynamo compiled nothing" in text
        assert "RNN, GRU, or LSTM" in text
    assert "calls rnn (nn.GRU)" in text
    assert "torch._dynamo.config.allow_rnn = True" in text
    assert "@torch.compiler.disable" in text


def test_the_remedies_for_a_skipped_function_help():
    assert len(elmo.explain(Recurrent(apart=True), *batch(), options=SMALL).matches) == 1
    with torch._dynamo.config.patch(allow_rnn=True):
        report = elmo.explain(Recurrent(apart=False), *batch(), options=SMALL)
    assert len(report.matches) == 1
    assert not report.notes
