"""What was rewritten, what was not and why, and what it saves: records, text and files."""

from elmo_compile.planner import HeadMemory, Term
from elmo_compile.report.records import Code, Match, Refusal, Report, Section
from elmo_compile.report.store import clear, last_report, record, reports

__all__ = [
    "Code",
    "HeadMemory",
    "Match",
    "Refusal",
    "Report",
    "Section",
    "Term",
    "clear",
    "last_report",
    "record",
    "reports",
]
