"""The backend keeps torch.compile's own behaviour: modes, options, recompiles, users' objects."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from programs import D, L, classes, compiled, features, matches, weight
from torch import nn

import elmo_compile as elmo
from elmo_compile.backend import elmo_backend

SMALL = {"lower": "eager", "min_outputs": 64}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(D, L)

    def forward(self, x, y):
        return F.cross_entropy(self.head(self.dropout(torch.relu(self.encoder(x)))), y)


def loss(x, w, y):
    return F.cross_entropy(F.linear(x, w), y)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_name_is_listed():
    assert "elmo" in torch._dynamo.list_backends()


def test_process_that_never_imported_the_package():
    program = """
        import sys, torch, torch.nn.functional as F
        w = torch.randn(20000, 4, requires_grad=True)
        step = torch.compile(lambda x, y: F.cross_entropy(F.linear(x, w), y), backend="elmo",
                             options={"lower": "eager"})
        loss = step(torch.randn(3, 4), torch.tensor([1, 2, 19999]))
        loss.backward()
        import elmo_compile
        print(len(elmo_compile.last_report().matches), tuple(w.grad.shape))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "1 (20000, 4)"


@pytest.mark.parametrize("options", [SMALL, elmo.Options(**SMALL)], ids=["dict", "Options"])
def test_options_as_dict_and_as_record(options):
    step = torch.compile(loss, backend=lambda gm, inputs: elmo_backend(gm, inputs, options=options))
    step(features(), weight(), classes())
    assert len(elmo.last_report().matches) == 1


def test_compilations_are_logged_as_they_happen(caplog):
    def sorted_logits(x, w):
        return F.linear(x, w).sort(-1).values.sum()

    with caplog.at_level(logging.INFO, "elmo_compile"):
        compiled(loss)(features(), weight(), classes())
        compiled(sorted_logits)(features(), weight())
    told = [record.getMessage() for record in caplog.records]
    assert "compiling, 1 head(s) rewritten" in told[0]
    assert f"cross_entropy of {L} outputs" in told[1]
    assert "left as it was" in told[-1]
    assert "sort" in told[-1]


def test_unknown_option_is_our_error_and_names_the_nearest():
    step = torch.compile(loss, backend="elmo", options={"chunk_sise": 3})
    for _ in range(2):
        with pytest.raises(elmo.OptionError, match="chunk_size"):
            step(features(), weight(), classes())


def test_mode_and_options_are_torch_compiles_own_conflict():
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(loss, backend="elmo", mode="max-autotune", options=SMALL)


def test_mode_reaches_inductor():
    step = torch.compile(loss, backend="elmo", mode="max-autotune-no-cudagraphs")
    args = features(), weight(), classes()
    torch.testing.assert_close(step(*args), loss(*args))


def test_contradicting_modes_are_an_error():
    options = elmo.Options(mode="default", **SMALL)
    step = torch.compile(
        loss, backend=lambda gm, inputs: elmo_backend(gm, inputs, mode="a", options=options)
    )
    with pytest.raises(elmo.OptionError, match="contradict"):
        step(features(), weight(), classes())


def test_graph_given_by_dynamo_is_not_changed():
    seen = []

    def backend(gm, inputs):
        before = gm.code, [dict(node.meta) for node in gm.graph.nodes]
        result = elmo_backend(gm, inputs, options=SMALL)
        seen.append((before, (gm.code, [dict(node.meta) for node in gm.graph.nodes])))
        return result

    torch.compile(loss, backend=backend)(features(), weight(), classes())
    ((before, after),) = seen
    assert before[0] == after[0]
    assert [set(meta) for meta in before[1]] == [set(meta) for meta in after[1]]


def graphs(backend, use) -> int:
    """How many graphs Dynamo hands to a backend while `use(step, model)` runs."""
    torch._dynamo.reset()
    count = 0

    def counting(gm, inputs):
        nonlocal count
        count += 1
        return backend(gm, inputs)

    model = Model()
    use(torch.compile(model, backend=counting), model)
    return count


def other_batch_sizes(step, model):
    for rows in (6, 7, 9, 12):
        step(features(rows), classes(rows)).backward()


def train_and_eval(step, model):
    for training in (True, False, True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            step(features(), classes())


def learning_rates(step, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rate in (0.1, 0.05, 0.01):
        optimizer.param_groups[0]["lr"] = rate
        step(features(), classes()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("use", [other_batch_sizes, train_and_eval, learning_rates])
def test_no_more_graphs_than_plain_compile(use):
    def ours(gm, inputs):
        return elmo_backend(gm, inputs, options=SMALL)

    assert graphs(ours, use) == graphs(lambda gm, inputs: gm, use)
    assert elmo.last_report().matches


def test_second_model_of_the_same_class_reuses_the_graph_with_its_own_weight():
    count = 0

    def counting(gm, inputs):
        nonlocal count
        count += 1
        return elmo_backend(gm, inputs, options=SMALL)

    x, y = features().detach(), classes()
    for _ in range(2):
        model = Model().eval()
        torch.compile(model, backend=counting)(x, y).backward()
        ours = model.head.weight.grad.clone()
        model.zero_grad()
        model(x, y).backward()
        torch.testing.assert_close(ours, model.head.weight.grad)
    assert count == 1


def test_fullgraph_and_graph_breaks():
    def broken(x, w, y):
        x = torch.sin(x)
        torch._dynamo.graph_break()
        return loss(x, w, y)

    args = features(), weight(), classes()
    torch.testing.assert_close(
        torch.compile(broken, backend="elmo", options=SMALL)(*args), broken(*args)
    )
    assert len(elmo.last_report().matches) == 1
    torch.testing.assert_close(compiled(loss)(*args), loss(*args))
    assert len(matches()) == 1


def test_ambient_functorch_does_no_harm():
    x, w, y = features().detach(), weight().detach(), classes()
    expected = torch.func.grad(loss, argnums=1)(x, w, y)
    ours = torch.func.grad(torch.compile(loss, backend="elmo", options=SMALL), argnums=1)(x, w, y)
    torch.testing.assert_close(ours, expected)


def test_a_defect_in_a_pass_is_a_refusal(monkeypatch):
    def broken(*_):
        raise KeyError("planted")

    monkeypatch.setattr("elmo_compile.passes.pipeline.match_region", broken)
    args = features(), weight(), classes()
    torch.testing.assert_close(compiled(loss)(*args), loss(*args))
    (refusal,) = elmo.last_report().refusals
    assert "planted" in refusal.reason
