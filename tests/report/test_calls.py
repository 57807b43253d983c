"""The graphs of one call make one report; another call makes another."""

from __future__ import annotations

import pytest
import torch

from elmo_compile import report
from elmo_compile.report import Section, calls
from elmo_compile.report.calls import current_call


@pytest.fixture(autouse=True)
def _empty_store():
    torch._dynamo.reset()
    report.clear()
    yield
    report.clear()
    torch._dynamo.reset()


def recording(graph, inputs):
    """A backend that records every graph under the graph's own operations."""
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_method"]
    report.record(Section(name="-".join(called)))
    return graph.forward


def names() -> list[list[str]]:
    """Section names of every report."""
    return [[section.name for section in found.sections] for found in report.reports()]


def broken(x):
    """Three graphs: before a break, in a function it calls, and after."""
    y = x.sin()
    torch._dynamo.graph_break()
    y = helper(y)
    torch._dynamo.graph_break()
    return y.tan()


def helper(y):
    """A graph break of its own."""
    y = y.cos()
    torch._dynamo.graph_break()
    return y.exp()


def test_outside_of_a_call():
    assert current_call() is None


def test_graph_breaks_stay_in_one_report():
    torch.compile(broken, backend=recording)(torch.ones(3))
    (sections,) = names()
    assert {"sin", "cos", "exp", "tan"} == set(sections)


def test_calls_in_turn_are_apart():
    for function in (lambda x: x.sin(), lambda x: x.cos(), broken, lambda x: x.tan()):
        torch.compile(function, backend=recording)(torch.ones(3))
    found = names()
    assert len(found) == 4
    assert [len(sections) for sections in found] == [1, 1, 4, 1]


def test_modules_with_a_graph_break():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return broken(x)

    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(Broken(), backend=recording)(torch.ones(3))
    assert [len(sections) for sections in names()] == [4, 4]


def test_a_recompilation_is_a_call_of_its_own():
    compiled = torch.compile(lambda x: x.sin(), backend=recording, dynamic=False)
    compiled(torch.ones(3))
    compiled(torch.ones(4))
    assert names() == [["sin"], ["sin"]]


class Broken(torch.nn.Module):
    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


def test_calls_of_a_module_are_told_apart_though_their_frames_have_one_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = []

    def backend(graph, inputs):
        groups.append(calls.current_call())
        return graph

    monkeypatch.setattr(calls, "id", lambda frame: 7, raising=False)
    run = torch.compile(Broken(), backend=backend, dynamic=False)
    run(torch.ones(2, 3))
    run(torch.ones(5, 3))
    first, second, third, fourth = groups
    assert first == second
    assert third == fourth
    assert first != third
