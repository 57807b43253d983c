"""The passes in order, and what they say about one graph.

Requires: a Dynamo graph, as a backend receives it.
Ensures: `analyze` only reads; `rewrite` edits a copy.
"""

from __future__ import annotations

import dataclasses

import torch.fx as fx

from elmo_compile.config import Options
from elmo_compile.passes.canonicalize import retrace
from elmo_compile.passes.find import find_regions
from elmo_compile.passes.match import match_region
from elmo_compile.passes.match.matcher import check_escape
from elmo_compile.passes.plan import plan_match
from elmo_compile.passes.records import AtenRegion, HeadMatch, PlannedHead, Region
from elmo_compile.report.records import Refusal


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What was found in one graph: heads that can be replaced, and the others with a reason."""

    module: fx.GraphModule
    heads: tuple[PlannedHead, ...]
    refusals: tuple[Refusal, ...]


def _find_escapes(item: Region, options: Options) -> Region | Refusal:
    return check_escape(item) or item


def _retrace(item: Region, options: Options) -> AtenRegion | Refusal:
    return retrace(item)


def _match(item: AtenRegion, options: Options) -> HeadMatch | Refusal:
    return match_region(item)


PASSES = (
    _find_escapes,
    _retrace,
    _match,
    plan_match,
)
"""Each takes one region a step further, or refuses it."""


def analyze(module: fx.GraphModule, options: Options) -> Analysis:
    """Find, retrace, match and plan every candidate head of a graph."""
    heads: list[PlannedHead] = []
    refusals: list[Refusal] = []
    for region in find_regions(module, options.min_outputs):
        item: object = region
        for step in PASSES:
            item = step(item, options)  # type: ignore[operator]
            if isinstance(item, Refusal):
                refusals.append(item)
                break
        else:
            assert isinstance(item, PlannedHead)
            heads.append(item)
    return Analysis(module, tuple(heads), tuple(refusals))
