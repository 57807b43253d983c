"""The passes in order, and what they say about one graph.

Requires: a Dynamo graph, as a backend receives it.
Ensures: `analyze` only reads; `rewrite` edits a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.config import Options
from elmo_compile.errors import ElmoError
from elmo_compile.passes.canonicalize import retrace
from elmo_compile.passes.columns import cut_weights
from elmo_compile.passes.convex import entangled
from elmo_compile.passes.defer import defer_outputs
from elmo_compile.passes.find import find_regions, largest_linear, weight_inputs, without_tail
from elmo_compile.passes.graphs import copy_module, source_of
from elmo_compile.passes.hazards import check_hazards
from elmo_compile.passes.match import match_program, match_region
from elmo_compile.passes.plan import plan_match
from elmo_compile.passes.records import (
    AtenRegion,
    DeferredOutput,
    HeadMatch,
    PlannedHead,
    ProgramMatch,
    Region,
)
from elmo_compile.passes.shards import localize
from elmo_compile.passes.vectors import without_vectors
from elmo_compile.passes.weights import store_by_outputs
from elmo_compile.report.records import Code, Refusal


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What was found in one graph: heads that can be replaced, and the others with a reason."""

    module: fx.GraphModule
    heads: tuple[PlannedHead, ...]
    refusals: tuple[Refusal, ...]
    deferred: tuple[tuple[DeferredOutput, PlannedHead], ...] = ()
    """Results taken out of the graph, and the planned head that makes the top of each row."""
    largest: int = 0
    """Outputs of the largest linear layer, where none has `min_outputs`."""
    left: tuple[tuple[int, str], ...] = ()
    """Inputs of the graph that are weights of linear layers left as they are, and why."""
    localized: frozenset[int] = frozenset()
    """Inputs of the graph that are passed as this process's part of a DTensor."""


def _check(item: Region, options: Options) -> Region | Refusal:
    return check_hazards(item, options.min_outputs) or item


def _retrace(item: Region, options: Options) -> AtenRegion | Refusal:
    return retrace(item)


def _match(item: AtenRegion, options: Options) -> HeadMatch | ProgramMatch | Refusal:
    """By a rule of its own, else as a program; a tail is left to the second attempt without it."""
    known = match_region(item)
    if isinstance(known, HeadMatch) or item.region.tail or known.code not in _PERHAPS_A_PROGRAM:
        return known
    return match_program(item)


_PERHAPS_A_PROGRAM = frozenset(
    {Code.UNKNOWN_LOSS, Code.UNSUPPORTED_ARGUMENT, Code.UNSUPPORTED_TARGET, Code.LOGITS_ESCAPE,
     Code.UNSUPPORTED_SHAPE, Code.MUTATION}
)  # fmt: skip


PASSES: tuple[Callable[[Any, Options], Any], ...] = (
    _check,
    _retrace,
    _match,
    plan_match,
)
"""Each takes one region a step further, or refuses it."""


def analyze(module: fx.GraphModule, options: Options) -> Analysis:
    """Find, retrace, match and plan every candidate head of a graph, logits that leave it included.

    Logits are left in the graph where the graph needs them all the same; so are a weight stored by
    features and outputs that are cut off where the head is refused.
    """
    keep: set[int] = set()
    whole: set[str] = set()
    by_outputs = True
    while True:
        copy = copy_module(module)
        localized = localize(copy)
        by_outputs = by_outputs and store_by_outputs(copy, options.min_outputs)
        cut = cut_weights(copy, options.min_outputs, whole)
        taken = [
            (output, _plan_top(output, options)) for output in defer_outputs(copy, options, keep)
        ]
        analysis = _analyze(copy, options)
        if by_outputs and analysis.refusals:
            by_outputs = False  # Not for nothing.
            continue
        inside = {node for head in analysis.heads for node in head.match.region.nodes}
        for_nothing = set(cut) - inside - {output.seed for output, _ in taken}
        if for_nothing:
            whole |= {node.name for node in for_nothing}
            continue
        remaining = set(copy.graph.nodes) - inside
        useless = {o.position for o, top in taken if top is None or o.seed in remaining}
        if not useless:
            planned = tuple((output, top) for output, top in taken if top is not None)
            return dataclasses.replace(
                analysis,
                deferred=planned,
                localized=localized,
            )
        keep |= useless


def _plan_top(output: DeferredOutput, options: Options) -> PlannedHead | None:
    with torch.no_grad():
        found = advance(output.top, options)
    return None if isinstance(found, Refusal) else found


def _analyze(module: fx.GraphModule, options: Options) -> Analysis:
    heads: list[PlannedHead] = []
    refusals: list[Refusal] = []
    left: list[tuple[int, str]] = []
    regions = find_regions(module, options.min_outputs)
    for region in regions:
        result = _first_understood(region, options)
        others = [set(head.match.region.nodes) for head in heads]
        if isinstance(result, PlannedHead) and entangled(set(result.match.region.nodes), others):
            result = _entangled(region)
        if isinstance(result, Refusal):
            refusals.append(result)
            why = f"the head was left as it was ({result.reason})"
            weights = weight_inputs(region.site, region.seed, region.num_outputs)
            left += [(position, why) for position in weights]
        else:
            heads.append(result)
    largest, weights = (0, []) if regions else largest_linear(module)
    small = f"it has {largest} outputs, below min_outputs={options.min_outputs}"
    left += [(position, small) for position in weights]
    return Analysis(module, tuple(heads), tuple(refusals), largest=largest, left=tuple(left))


def _first_understood(region: Region, options: Options) -> PlannedHead | Refusal:
    """A region, or the part of it that every pass accepts; else the refusal of the last part."""
    smaller = without_vectors(region)
    attempts = dict.fromkeys((region, without_tail(region), smaller, without_tail(smaller)))
    result: PlannedHead | Refusal | None = None
    for attempt in attempts:
        result = advance(attempt, options)
        if isinstance(result, PlannedHead):
            return result
    assert result is not None
    return result


def advance(region: Region, options: Options) -> PlannedHead | Refusal:
    """One region through every pass, or the first refusal."""
    item: Any = region
    for step in PASSES:
        try:
            item = step(item, options)
        except ElmoError:
            raise
        except Exception as error:  # A defect here must not stop a program that Inductor compiles.
            return _defect(region, step.__name__, error)
        if isinstance(item, Refusal):
            return item
    assert isinstance(item, PlannedHead)
    return item


def _entangled(region: Region) -> Refusal:
    return Refusal(
        code=Code.UNKNOWN_LOSS,
        node=region.seed.name,
        source=source_of(region.seed),
        reason="this head's loss and another head's are each made from the other's logits",
        remedy="compute one of the two losses in a compiled function of its own",
    )


def _defect(region: Region, step: str, error: Exception) -> Refusal:
    return Refusal(
        code=Code.RETRACE_FAILED,
        node=region.seed.name,
        source=source_of(region.seed),
        reason=f"the pass `{step}` failed ({type(error).__name__}: {error})",
        remedy="please report it with this text; plain Inductor compiles the graph as it is",
    )
