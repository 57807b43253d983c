"""The "elmo" backend of torch.compile (entry point `torch_dynamo_backends`)."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from elmo_compile import ops
from elmo_compile.config import Options
from elmo_compile.errors import ElmoError, NotRewritten, OptionError
from elmo_compile.lowering import build_vector_probes, lower
from elmo_compile.ops.owners import Owner, owner_of, update_shares
from elmo_compile.ops.unfused import note
from elmo_compile.passes.graphs import copy_module, parameter_name, sites, source_of
from elmo_compile.passes.pipeline import Analysis, analyze
from elmo_compile.passes.plan import unmatched_lowp
from elmo_compile.passes.records import PlannedHead
from elmo_compile.planner import Plan, with_state
from elmo_compile.report.records import Code, Match, Refusal, Section
from elmo_compile.report.store import record, tell_updates
from elmo_compile.runtime import CompiledGraph, give_name

_log = logging.getLogger("elmo_compile")


def elmo_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: heads rewritten to chunked ops, the rest handed to Inductor.

    Args:
        gm: the graph; not modified.
        example_inputs: its inputs: parameters, tensors, symbolic sizes.
        mode: Inductor's mode, as `torch.compile(mode=)` passes it.
        options: an Options or a dict of its fields.

    Returns:
        The compiled graph. Our own errors (OptionError; NotRewritten with `strict=True`) are raised
        when it is first called: Dynamo would wrap them in an error of its own here.
    """
    try:
        return _compile(gm, example_inputs, mode, options)
    except ElmoError as error:
        return functools.partial(_raise, error)


tell_updates(update_shares)


def _raise(error: ElmoError, *_: Any) -> Any:
    raise error


def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: Mapping[str, Any] | Options | None,
) -> Callable[..., Any]:
    chosen = Options.from_mapping(options)
    if mode is not None:
        if chosen.mode is not None and chosen.mode != mode:
            raise OptionError(
                f"mode={mode!r} and options mode={chosen.mode!r} contradict each other"
            )
        chosen = Options.from_mapping({**_fields(chosen), "mode": mode})
    if chosen.lower == "inductor" and _on_cpu(example_inputs):
        build_vector_probes()
    analysis = _analyze(gm, chosen)
    _note_left(analysis, example_inputs)
    if chosen.strict and analysis.refusals:
        raise NotRewritten(strict_message(analysis.refusals))
    name = _name()
    if not _needs_runtime(analysis):
        _tell(_untouched(name, gm, analysis, chosen))
        return lower(gm, example_inputs, chosen, rewritten=False)
    _log.info("graph %s: compiling, %d head(s) rewritten", name, len(analysis.heads))
    compiled = CompiledGraph(analysis, example_inputs, chosen)
    compiled.compile_first(example_inputs)
    _tell(section(name, gm, compiled, example_inputs))
    return compiled


def _tell(section: Section) -> None:
    """Keep a graph's report, and log its heads, a line each."""
    record(section)
    for match in section.matches:
        _log.info("graph %s: %s", section.name, match)
    for refusal in section.refusals:
        _log.info("graph %s: left as it was: %s", section.name, refusal)


def _note_left(analysis: Analysis, inputs: Sequence[Any]) -> None:
    """Name the graph's weights to their optimizer, and tell it of each whose linear layer was left
    as it was."""
    placeholders = analysis.module.graph.find_nodes(op="placeholder")
    for placeholder, value in zip(placeholders, inputs):
        owner = owner_of(value) if isinstance(value, torch.Tensor) else None
        if owner is not None:
            give_name(owner, parameter_name(placeholder))
    for position, why in analysis.left:
        note(inputs[position], why)


def _on_cpu(inputs: Sequence[Any]) -> bool:
    """Whether a graph is handed tensors of a CPU."""
    return any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in inputs)


def keep(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that can still be examined when Dynamo is done with it."""
    copy = copy_module(gm)
    reason: Any = getattr(gm, _REASON, None)
    setattr(copy, _REASON, reason)
    return copy


def examine(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, name: str
) -> tuple[Section, bool]:
    """What the backend would say of a graph, and whether it has heads; compiles nothing."""
    analysis = _analyze(gm, options)
    if not _needs_runtime(analysis):
        return _untouched(name, gm, analysis, options), False
    compiled = CompiledGraph(analysis, inputs, options)
    return section(name, gm, compiled, inputs), bool(analysis.heads or analysis.deferred)


def _analyze(gm: fx.GraphModule, options: Options) -> Analysis:
    ops.load()
    return analyze(gm, options)


def _needs_runtime(analysis: Analysis) -> bool:
    """Whether anything is to be replaced: a head, a converted head's weight by its carrier, or a
    sharded one's by this process's part."""
    if analysis.heads or analysis.deferred or analysis.localized:
        return True
    converted = any(unmatched_lowp(site.module, ()) for site in sites(analysis.module))
    return converted and torch.is_grad_enabled()


def _untouched(name: str, gm: fx.GraphModule, analysis: Analysis, options: Options) -> Section:
    """The report of a graph in which nothing was replaced."""
    small = (analysis.largest, options.min_outputs) if analysis.largest else None
    return Section(
        name=name,
        refusals=analysis.refusals,
        below_min_outputs=small,
        graph_before=gm,
        graph_after=gm,
    )


def section(
    name: str, gm: fx.GraphModule, compiled: CompiledGraph, inputs: Sequence[Any]
) -> Section:
    """The report of one rewritten graph, as it is first called."""
    matches, plans = [], []
    analysis = compiled.analysis
    refusals = list(analysis.refusals)
    for head, (kind, owner, why) in zip(analysis.heads, compiled.treatments(inputs)):
        if kind == "untouched":
            refusals.append(_excluded(head.match.region.seed))
            continue
        fused = kind == "fused"
        plan = head.fused_plan if fused else head.plan
        notes = head.notes + plan.notes
        notes += _how(plan)
        if why:
            notes += (f"the update is not fused: {why}",)
        at_step = owner is not None and owner.policy().at_step
        if at_step:
            notes += (
                "update_at='step': backward keeps what the gradient follows from (features, "
                "targets, row statistics), and opt.step() updates in a second pass",
            )
        matches.append(
            Match(
                loss=head.match.loss.name,
                name=compiled.name_of(head.weight_input, inputs),
                num_outputs=head.match.region.num_outputs,
                num_features=head.match.num_features,
                fused_update=fused,
                at_step=at_step,
                chunk_size=plan.chunk_size,
                dtype=head.weight_dtype,
                compute_dtype=head.compute_dtype,
                products=plan.products + at_step,
                source=source_of(head.match.region.seed),
                deferred=head.match.region.seed in compiled.made,
                made=compiled.made.get(head.match.region.seed, {}),
                loss_value=head.loss_value if fused else "exact",
                notes=notes,
            )
        )
        plans.append(_with_state(plan, owner, matches[-1]))
    for output, top in analysis.deferred:
        if output.seed in {head.match.region.seed for head in analysis.heads}:
            continue
        made = compiled.made[output.seed]
        name = compiled.name_of(compiled.weight_of(output), inputs)
        matches.append(_deferred(top, source_of(output.seed), name, made, _graph_break(gm)))
        plans.append(top.plan)
    return Section(
        name=name,
        matches=tuple(matches),
        plans=tuple(plans),
        refusals=tuple(refusals),
        graph_before=gm,
        graph_after=compiled.first.module,
    )


def _with_state(plan: Plan, owner: Owner | None, match: Match) -> Plan:
    """A head's plan with the bytes of its optimizer's state."""
    state = [] if owner is None else owner.state_sizes()
    sizes = {"outputs": match.num_outputs, "features": match.num_features}
    return dataclasses.replace(plan, memory=with_state(plan.memory, state, **sizes))


def _how(plan: Plan) -> tuple[str, ...]:
    """What of a plan the user should know, beside chunk and products."""
    notes: tuple[str, ...] = ()
    if plan.at_once:
        notes += (
            "the gradients are formed in the forward, which saves a product: the weight's exists "
            "from then on, and is wasted where no backward follows (use torch.no_grad() there)",
        )
    if plan.row_block:
        notes += (f"the logits of {plan.row_block} rows at a time are held",)
    if plan.holds_logits:
        notes += ("the logits are held from forward to backward: memory_budget has room for them",)
    return notes


_REASON = "compile_subgraph_reason"
"""Where Dynamo says why a graph ends; torch._dynamo.explain reads it too (tried on 2.13)."""


def _graph_break(gm: fx.GraphModule) -> str:
    """The user's line after which Dynamo ended a graph, and its reason, if it had to."""
    reason: Any = getattr(gm, _REASON, None)
    if reason is None or not reason.graph_break or not reason.user_stack:
        return ""
    frame = reason.user_stack[-1]
    why = str(reason.reason).partition("\n")[0]
    told = "" if why in ("", "step_unsupported") else f" ({why})"
    return f"{frame.filename}:{frame.lineno}: {frame.line}{told}"


def _deferred(
    top: PlannedHead, source: str, name: str, made: Mapping[str, int], graph_break: str
) -> Match:
    """A head whose logits leave the graph and whose loss, if any, is outside."""
    return Match(
        loss="linear",
        name=name,
        num_outputs=top.match.region.num_outputs,
        num_features=top.match.num_features,
        fused_update=False,
        chunk_size=top.plan.chunk_size,
        dtype=top.weight_dtype,
        compute_dtype=top.compute_dtype,
        products=0,
        source=source,
        deferred=True,
        made=made,
        graph_break=graph_break,
        notes=(
            "a loss of the deferred logits is compiled when it is called, and says in a report of "
            "its own (elmo_compile.reports()) how the weight is updated; bytes and chunk here are "
            "those of the argmax and largest logits of each row",
        ),
    )


def _excluded(seed: fx.Node) -> Refusal:
    return Refusal(
        code=Code.EXCLUDED,
        node=seed.name,
        source=source_of(seed),
        reason="the weight's module was excluded with elmo_compile.exclude",
        remedy="do not exclude it, if it is to be rewritten",
    )


def strict_message(refusals: Sequence[Refusal]) -> str:
    """Every refusal, a line each."""
    lines = "\n".join(f"  {refusal}" for refusal in refusals)
    return f"strict=True and {len(refusals)} candidate head(s) were not rewritten:\n{lines}"


def _fields(options: Options) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def _name() -> str:
    context = torch._guards.CompileContext.current_compile_id()
    return "graph" if context is None else str(context)
