"""The reports of this process: bounded, thread-safe, without tensors."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable, Hashable

from elmo_compile.report.calls import current_call
from elmo_compile.report.records import Match, Report, Section

KEPT = 64
"""Reports kept; the oldest goes first."""


@dataclasses.dataclass
class _Entry:
    group: Hashable
    report: Report


_lock = threading.Lock()
_entries: deque[_Entry] = deque(maxlen=KEPT)


def record(section: Section, *, group: Hashable = None) -> Report:
    """Add one compiled graph to this process's reports.

    Args:
        section: the graph.
        group: what the graph belongs to. Sections of one group make one report, a section of the
            same name replacing the earlier one. None: the call of a compiled function that is
            being compiled for (its graph breaks make several graphs); outside of one, a report
            of its own.

    Returns:
        The report the section is now in, which is also the last one.
    """
    group = current_call() if group is None else group
    with _lock:
        report = Report((section,))
        known = [e for e in _entries if group is not None and e.group == group]
        if known:
            kept = tuple(s for s in known[0].report.sections if s.name != section.name)
            report = Report((*kept, section))
            _entries.remove(known[0])
        _entries.append(_Entry(group, report))
        return report


Updates = dict[str, dict[str, float]]
_updates: list[Callable[[], Updates]] = []


def tell_updates(source: Callable[[], Updates]) -> None:
    """Let reports show what `source` knows of fused updates (`Report.updates`)."""
    _updates[:] = [source]


def reports() -> tuple[Report, ...]:
    """The reports of this process, oldest first."""
    with _lock:
        found = [entry.report for entry in _entries]
    return tuple(_with_updates(report) for report in found)


def last_report() -> Report:
    """What was compiled last in this process; an empty report if nothing was."""
    with _lock:
        found = [entry.report for entry in _entries]
    last = found.pop() if found else Report()
    made = (match for report in reversed(found) for match in report.matches if match.made)
    notes = tuple(map(_made, itertools.islice(made, 1)))
    return _with_updates(dataclasses.replace(last, notes=notes) if notes else last)


def _made(match: Match) -> str:
    """Of the last head in another report whose logits were made: the last one may be of a loss of
    them."""
    where = f" at {match.source}" if match.source else ""
    return (
        f"another report (elmo_compile.reports()): the deferred logits of the head{where} were "
        f"made as values, {sum(match.made.values())} times"
    )


def _with_updates(report: Report) -> Report:
    updates = _updates[0]() if _updates else {}
    return dataclasses.replace(report, updates=updates) if updates else report


def clear() -> None:
    """Forget every report."""
    with _lock:
        _entries.clear()
