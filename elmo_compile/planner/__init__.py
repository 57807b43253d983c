"""Sizes in, plan out: sympy arithmetic that knows no graph and no tensor."""

from elmo_compile.planner.choose import Plan, PlanRefusal, plan
from elmo_compile.planner.device import DeviceLimits, cpu_cache_bytes, limits_for
from elmo_compile.planner.memory import HeadMemory, Term, with_state
from elmo_compile.planner.shape import HeadShape, ProgramSize, default_compute_dtype
from elmo_compile.planner.traffic import TrafficTable

__all__ = [
    "DeviceLimits",
    "HeadMemory",
    "HeadShape",
    "Plan",
    "PlanRefusal",
    "ProgramSize",
    "Term",
    "TrafficTable",
    "cpu_cache_bytes",
    "default_compute_dtype",
    "limits_for",
    "plan",
    "with_state",
]
