"""A report as a folder of files: text, numbers, and the graphs as Python."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from elmo_compile.planner import HeadMemory, Plan, Term
from elmo_compile.report.records import Match, Report, Section
from elmo_compile.report.render import dtype_name, render
from elmo_compile.report.source import graph_source


def dump(report: Report, folder: Path) -> Path:
    """Write `report.txt`, `ledger.json` and, a section, `before.py`, `after.py`.

    The graph files are readable (shapes and source lines as comments) and run by themselves, on
    random inputs of the sizes that were compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(render(report) + "\n", encoding="utf-8")
    ledger = {"sections": [_section(section) for section in report.sections]}
    text = json.dumps(ledger, indent=2, sort_keys=True)
    (folder / "ledger.json").write_text(text + "\n", encoding="utf-8")
    for index, section in enumerate(report.sections):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", section.name).strip("._") or "graph"
        place = folder / f"{index:02d}-{name}"
        for which, graph in (("before", section.graph_before), ("after", section.graph_after)):
            if graph is not None:
                place.mkdir(exist_ok=True)
                outputs = min((match.num_outputs for match in section.matches), default=1)
                text = graph_source(graph, section.graph_before or graph, outputs)
                (place / f"{which}.py").write_text(text, encoding="utf-8")
    return folder


def _section(section: Section) -> dict[str, Any]:
    return {
        "name": section.name,
        "heads": [
            {"match": _match(match), "plan": _plan(plan)}
            for match, plan in zip(section.matches, section.plans)
        ],
        "refusals": [
            {**dataclasses.asdict(refusal), "code": refusal.code.value}
            for refusal in section.refusals
        ],
    }


def _match(match: Match) -> dict[str, Any]:
    names = {"dtype": dtype_name(match.dtype), "compute_dtype": dtype_name(match.compute_dtype)}
    return {**dataclasses.asdict(match), **names, "made": dict(match.made)}


def _plan(plan: Plan) -> dict[str, Any]:
    traffic = plan.traffic
    return {
        "chunk_size": plan.chunk_size,
        "products": plan.products,
        "notes": list(plan.notes),
        "memory": _memory(plan.memory),
        "operations": _formula(traffic.operations, traffic.operations_number),
        "bytes_read": _formula(traffic.read, traffic.read_bytes),
        "bytes_written": _formula(traffic.written, traffic.written_bytes),
    }


def _memory(memory: HeadMemory) -> dict[str, Any]:
    return {
        "before": [_term(term) for term in memory.before],
        "after": [_term(term) for term in memory.after],
        "total_before": _formula(memory.total_before, memory.bytes_before),
        "total_after": _formula(memory.total_after, memory.bytes_after),
        "temporaries": _formula(memory.temporaries, memory.temporary_bytes),
    }


def _term(term: Term) -> dict[str, Any]:
    return {"name": term.name, "moments": list(term.moments), **_formula(term.expr, term.bytes)}


def _formula(expr: Any, number: int) -> dict[str, Any]:
    return {"formula": str(expr), "number": number}
