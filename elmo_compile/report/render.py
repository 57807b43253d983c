"""A report as plain text."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from elmo_compile.planner import HeadMemory, Plan, Term
from elmo_compile.report.records import Match, Refusal, Report

WIDTH = 110
LEGEND = (
    "Bytes, with the optimizer's state where the update is fused: N rows, D features, L outputs, "
    "C outputs per chunk, M listed positives"
)
NOTHING = (
    "no graph has reached the backend: nothing compiled with it was called yet, or Dynamo skipped "
    "the function (as it does with those that call nn.RNN, nn.GRU or nn.LSTM); "
    "elmo_compile.explain says which"
)


def render(report: Report) -> str:
    """The report as text of at most 110 columns, without ANSI codes."""
    lines: list[RenderableType] = [Text(_headline(report))]
    lines += [Text(f"  note: {note}") for note in _about_all(report)]
    if report.matches:
        lines.append(_heads(report.matches))
        lines.append(Text(LEGEND))
    for number, (match, plan) in enumerate(zip(report.matches, report.plans), start=1):
        lines += [Text(""), Text(_summary(number, match, plan)), _memory(plan.memory)]
        lines += [Text(f"  note: {note}") for note in dict.fromkeys((*match.notes, *plan.notes))]
    for refusal in report.refusals:
        lines += [Text(""), Text(_refused(refusal))]
    for name, shares in report.updates.items():
        lines.append(Text(_updated(name, shares)))
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True, legacy_windows=False)
    with console.capture() as capture:
        for line in lines:
            console.print(line)
    return "\n".join(row.rstrip() for row in capture.get().splitlines())


def _about_all(report: Report) -> tuple[str, ...]:
    """Why there is nothing to show, where that is so."""
    if not (report.notes or report.sections):
        return (NOTHING,)
    small = [s.below_min_outputs for s in report.sections if s.below_min_outputs is not None]
    if not small or report.matches or report.refusals:
        return report.notes
    outputs, least = max(small)
    return (
        f"the largest linear layer has {_plural(outputs, 'output')}, below min_outputs={least}: "
        "smaller heads are left to Inductor (options={'min_outputs': ...})",
        *report.notes,
    )


def _updated(name: str, shares: Mapping[str, float]) -> str:
    """One fused head's counters; shares are NaN where nothing is rounded."""
    text = f"Head {name}: {int(shares['updates'])} updates in this process"
    counted = [f"{k} {shares[k]:.1%}" for k in ("unchanged", "saturated", "zero")]
    return text if math.isnan(shares["zero"]) else f"{text}; of a sample {', '.join(counted)}"


def human_bytes(size: int) -> str:
    """`size` with the largest binary unit that leaves at least 1: "1.50 MiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def dtype_name(dtype: object) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _headline(report: Report) -> str:
    counts = (
        _plural(len(report.sections), "graph"),
        f"{_plural(len(report.matches), 'head')} rewritten",
        f"{len(report.refusals)} left as they were",
    )
    return "elmo: " + ", ".join(counts)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _heads(matches: tuple[Match, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("#", "loss", "outputs", "features", "stored", "computed", "chunk", "products"):
        table.add_column(name, justify="left" if name in ("loss", "stored") else "right")
    table.add_column("weight update")
    for number, match in enumerate(matches, start=1):
        table.add_row(
            str(number),
            match.loss,
            str(match.num_outputs),
            str(match.num_features),
            dtype_name(match.dtype),
            dtype_name(match.compute_dtype),
            str(match.chunk_size),
            str(match.products),
            match.update,
        )
    return table


def _summary(number: int, match: Match, plan: Plan) -> str:
    memory = plan.memory
    deferred = "; logits deferred" if match.deferred else ""
    where = f" at {match.source}" if match.source else ""
    saved = f"{human_bytes(memory.bytes_after)} instead of {human_bytes(memory.bytes_before)}"
    lines = [
        f"Head {number}{f', {match.name}' if match.name else ''}: {match.loss}{where}",
        f"  holds {saved}",
        f"  {human_bytes(plan.temporary_bytes)} of temporaries instead of "
        f"{human_bytes(plan.logits_bytes)} of logits",
        f"  loss value: {match.loss_value}{deferred}",
    ]
    if memory.bytes_after > memory.bytes_before:
        lines[1] += ", which is more: min_outputs= leaves heads as small as this alone"
    if match.made:
        times = _plural(sum(match.made.values()), "time")
        reasons = [f"    {_plural(n, 'time')}: {why}" for why, n in match.made.items()]
        made = f"  its {human_bytes(plan.logits_bytes)} of logits were made all the same, {times}:"
        lines[1:3] = [f"  would hold {saved}, but", made, *reasons]
    elif match.graph_break:
        lines[1] = f"  holds {saved}, unless something makes the logits"
    if match.graph_break:
        lines.append(
            f"  the graph ends between head and loss, at {match.graph_break}\n"
            "    what is compiled behind it, and receives the logits, makes them; a loss called in "
            "code that is not compiled streams"
        )
    return "\n".join(lines)


def _memory(memory: HeadMemory) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("term", "formula", "before", "after"):
        table.add_column(name, justify="right" if name in ("before", "after") else "left")
    before = {term.name: term for term in memory.before}
    after = {term.name: term for term in memory.after}
    for name in dict.fromkeys((*before, *after)):
        term = before.get(name) or after[name]
        table.add_row(name, Text(str(term.expr)), _size(before.get(name)), _size(after.get(name)))
    table.add_section()
    totals = human_bytes(memory.bytes_before), human_bytes(memory.bytes_after)
    table.add_row("peak", "", *totals)
    return table


def _size(term: Term | None) -> str:
    return "-" if term is None else human_bytes(term.bytes)


def _refused(refusal: Refusal) -> str:
    where = f" ({refusal.source})" if refusal.source else ""
    return (
        f"Left as it was: {refusal.node}{where} [{refusal.code}]\n"
        f"  reason: {refusal.reason}\n"
        f"  remedy: {refusal.remedy}"
    )
