"""A report reads as text, is written as files, and holds no tensors."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import pickle
import threading

import pytest
import torch

from elmo_compile import report
from elmo_compile.numerics.losses import BCE, LossSpec
from elmo_compile.planner import HeadShape, Plan, plan
from elmo_compile.report import Code, Match, Refusal, Report, Section
from elmo_compile.report.render import human_bytes
from elmo_compile.report.store import KEPT
from elmo_compile.report.strip import strip


@pytest.fixture(autouse=True)
def _empty_store():
    report.clear()
    yield
    report.clear()


def a_plan() -> Plan:
    """128 x 768 x 670 091, fused bf16 BCE."""
    shape = HeadShape(
        rows=128,
        features=768,
        outputs=670_091,
        loss=LossSpec(name=BCE, targets="padded"),
        weight_dtype=torch.bfloat16,
        feature_dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
        fused_update=True,
        positives=640,
    )
    found = plan(shape)
    assert isinstance(found, Plan)
    return found


def a_match(**changes) -> Match:
    """The match of `a_plan`."""
    chosen = a_plan()
    values = {
        "loss": BCE,
        "num_outputs": 670_091,
        "num_features": 768,
        "fused_update": True,
        "chunk_size": chosen.chunk_size,
        "dtype": torch.bfloat16,
        "compute_dtype": torch.bfloat16,
        "products": chosen.products,
        "source": "train.py:12: loss = bce(z, y)",
    }
    return Match(**{**values, **changes})


def a_refusal() -> Refusal:
    """Logits that are returned."""
    return Refusal(
        code=Code.LOGITS_ESCAPE,
        node="linear_3",
        source="model.py:7: return logits",
        reason="the logits are returned",
        remedy="return the loss only",
    )


def captured(function, *args, dynamic=False):
    """The graph Dynamo makes of a function."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return graphs[0]


class Model(torch.nn.Module):
    """Parameters, a buffer-like constant and a checkpointed body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 16)

    def forward(self, x):
        """A sum."""
        body = torch.utils.checkpoint.checkpoint
        return body(lambda t: self.head(t).relu(), x, use_reentrant=False).sum()


def test_report_concatenates_its_sections():
    one = Section(name="0/0", matches=(a_match(),), plans=(a_plan(),))
    two = Section(name="1/0", refusals=(a_refusal(),))
    both = Report((one, two))
    assert both.matches == one.matches
    assert both.refusals == two.refusals
    assert both.memory == (a_plan().memory,)
    assert both.plans == one.plans
    assert both.graph_before is None


def test_the_graph_is_of_the_section_that_holds_a_match():
    graphs = [torch.fx.symbolic_trace(lambda x, n=n: x * n) for n in (2, 3, 4)]
    empty = Section(name="0", graph_before=graphs[0])
    full = Section(name="1", matches=(a_match(),), plans=(a_plan(),), graph_before=graphs[1])
    last = Section(name="2", graph_before=graphs[2])
    assert Report((empty, full, last)).graph_before.code == graphs[1].code
    assert Report((empty, last)).graph_before.code == graphs[2].code


def test_a_match_has_a_plan():
    with pytest.raises(ValueError, match="1 matches, but 0 plans"):
        Section(name="0", matches=(a_match(),))


def test_records_are_frozen_and_picklable():
    for value in (a_match(), a_refusal(), a_plan()):
        assert pickle.loads(pickle.dumps(value)) == value
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.notes = ()


def test_text():
    matches = (a_match(notes=("weight decay is zero",)),)
    section = Section(name="0/0", matches=matches, plans=(a_plan(),), refusals=(a_refusal(),))
    text = str(Report((section,)))
    assert "\x1b" not in text
    assert all(len(line) <= 110 and line == line.rstrip() for line in text.splitlines())
    for expected in (
        "1 graph, 1 head rewritten, 1 left as they were",
        "binary_cross_entropy_with_logits at train.py:12: loss = bce(z, y)",
        "670091",
        "in backward",
        "multi-hot targets",
        "2*C*N",
        "163.60 MiB of logits",
        "note: weight decay is zero",
        "[logits-escape]",
        "reason: the logits are returned",
        "remedy: return the loss only",
    ):
        assert expected in text


def test_a_head_has_one_name():
    matches = (a_match(name="decoder.weight", fused_update=True, at_step=True),)
    section = Section(name="0/0", matches=matches, plans=(a_plan(),))
    shares = dict.fromkeys(("unchanged", "saturated", "zero"), float("nan"))
    text = str(Report((section,), updates={"decoder.weight": {"updates": 3, **shares}}))
    assert "Head 1, decoder.weight: binary" in text
    assert "Head decoder.weight: 3 updates in this process" in text
    assert "in opt.step()" in text
    assert "in backward" not in text


def test_user_text_is_never_markup():
    source = "a.py:1: x[red] = [bold]y[/bold]"
    refusal = dataclasses.replace(a_refusal(), source=source)
    text = str(Report((Section(name="0", refusals=(refusal,)),)))
    assert source in text


def test_an_empty_report_reads_too(tmp_path):
    first, *rest = str(Report()).splitlines()
    assert first == "elmo: 0 graphs, 0 heads rewritten, 0 left as they were"
    assert "no graph has reached the backend" in rest[0]
    assert Report().graph_after is None
    assert Report().dump(tmp_path / "deep" / "er").exists()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (3 << 30, "3.00 GiB"),
        (1 << 42, "4.00 TiB"),
    ],
)
def test_human_bytes(size, text):
    assert human_bytes(size) == text


def test_match_as_one_line():
    match = a_match(name="head.weight", deferred=True, chunk_size=4096)
    assert str(match) == (
        "head.weight: binary_cross_entropy_with_logits of 670091 outputs, in chunks of 4096, "
        "weight updated in backward, logits deferred (train.py:12: loss = bce(z, y))"
    )
    plain = a_match(fused_update=False, source="", chunk_size=4096)
    assert str(plain) == (
        "binary_cross_entropy_with_logits of 670091 outputs, in chunks of 4096, "
        "weight updated by gradient"
    )


def test_refusal_as_one_line():
    assert str(a_refusal()) == (
        "[logits-escape] linear_3 at model.py:7: return logits: the logits are returned; "
        "return the loss only"
    )
    assert f"{Code.BUDGET}" == "budget"


def test_dump_writes_text_ledger_and_python(tmp_path):
    graph = captured(Model(), torch.randn(4, 8))
    section = Section(
        name="0/0",
        matches=(a_match(),),
        plans=(a_plan(),),
        refusals=(a_refusal(),),
        graph_before=graph,
        graph_after=graph,
    )
    folder = report.record(section).dump(tmp_path / "out")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "report.txt",
        "ledger.json",
        "00-0_0/before.py",
        "00-0_0/after.py",
    }
    (entry,) = json.loads((folder / "ledger.json").read_text())["sections"]
    memory = entry["heads"][0]["plan"]["memory"]
    assert {"name": "weight", "moments": [], "formula": "2*D*L", "number": 1029259776} in (
        memory["after"]
    )
    assert memory["total_after"]["number"] == a_plan().memory.bytes_after
    assert entry["refusals"][0]["code"] == "logits-escape"
    assert entry["heads"][0]["match"]["dtype"] == "bfloat16"
    source = (folder / "00-0_0" / "before.py").read_text()
    compile(source, "before.py", "exec")
    assert "f32[4, 8]" in source
    assert "test_report.py" in source


def reachable(graph) -> list[object]:
    """Everything a graph module keeps alive, but for functions, types and modules of Python."""
    seen: dict[int, object] = {}
    waiting = [graph]
    while waiting:
        thing = waiting.pop()
        code = callable(thing) and not isinstance(thing, torch.nn.Module)
        if id(thing) not in seen and not code and not inspect.ismodule(thing):
            seen[id(thing)] = thing
            waiting += gc.get_referents(thing)
    return list(seen.values())


def heavy(things) -> list[object]:
    """Tensors with or without storage, sizes and modes that belong to a tracer."""
    tracer = (torch.SymInt, torch._subclasses.FakeTensorMode, torch._subclasses.FakeTensor)
    real = [t for t in things if isinstance(t, torch.Tensor) and t.device.type != "meta"]
    return real + [t for t in things if isinstance(t, tracer)]


def test_stored_graphs_hold_no_tensors_and_no_tracer():
    graph = captured(Model(), torch.randn(4, 8), dynamic=True)
    assert heavy(reachable(graph))
    stored = report.record(Section(name="0", graph_before=graph)).graph_before
    assert stored.code == graph.code
    assert not heavy(reachable(stored))
    assert heavy(reachable(graph)), "the graph given was changed"


def test_stripping_keeps_attributes_readable():
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 2))
            self.inner = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x) @ self.weight.t()

    graph = torch.fx.symbolic_trace(Holder())
    stored = strip(graph)
    assert stored.weight.shape == (3, 2)
    assert stored.weight.device.type == "meta"
    assert "Linear(in_features=2" in str(stored.inner)
    assert not list(stored.inner.parameters())
    assert graph.weight.device.type == "cpu"
    assert strip(None) is None


def test_store_groups_replaces_and_forgets():
    assert report.last_report() == Report()
    assert report.reports() == ()
    report.record(Section(name="0"), group="a")
    report.record(Section(name="0"), group="b")
    report.record(Section(name="1"), group="a")
    assert [s.name for s in report.last_report().sections] == ["0", "1"]
    assert len(report.reports()) == 2
    report.record(Section(name="1", refusals=(a_refusal(),)), group="a")
    assert [len(s.refusals) for s in report.last_report().sections] == [0, 1]
    report.record(Section(name="0"))
    assert len(report.record(Section(name="1")).sections) == 1
    for number in range(KEPT + 5):
        report.record(Section(name=str(number)))
    assert len(report.reports()) == KEPT
    assert report.reports()[-1].sections[0].name == str(KEPT + 4)


def test_store_is_thread_safe():
    def work(name):
        for number in range(20):
            report.record(Section(name=f"{name}/{number}"), group="shared")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (only,) = report.reports()
    assert len(only.sections) == 160
