"""Plan: sizes of a match to chunk, memory and traffic, by the planner's arithmetic.

Requires: a HeadMatch.
Ensures: a PlannedHead, or a Refusal where no chunk fits the budget or the head cannot be computed.
Numerics: products take the operand dtype of the program, or of the storage where it is narrower.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
import torch.fx as fx

from elmo_compile.config import LossValue, Options
from elmo_compile.numerics.features import FP8
from elmo_compile.numerics.losses import BCE, CE
from elmo_compile.passes.find import cut_from
from elmo_compile.passes.graphs import hint, hints, source_of, tensor_of
from elmo_compile.passes.match.linear import HEAD_OPS
from elmo_compile.passes.records import HeadMatch, PlannedHead, ProgramMatch, Region
from elmo_compile.passes.shards import is_sharded, shard_of
from elmo_compile.planner import (
    HeadShape,
    Plan,
    PlanRefusal,
    ProgramSize,
    default_compute_dtype,
    limits_for,
    plan,
)
from elmo_compile.report.records import Code, Refusal

WEIGHT_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
)  # fmt: skip


def plan_match(match: HeadMatch | ProgramMatch, options: Options) -> PlannedHead | Refusal:
    """Everything about one head that does not depend on the call."""
    weight = tensor_of(match.weight_origin)
    x = tensor_of(match.x)
    assert weight is not None
    assert x is not None
    refusal = _check(match, weight, options)
    if refusal is not None:
        return refusal
    device = weight.device.type
    compute = options.compute or compute_dtype(weight.dtype, match.compute_dtype, device)
    plans: list[Plan] = []
    for fused in (False, True):
        found = plan(_shape(match, weight, x, compute, options, fused), options, _limits(device))
        if isinstance(found, PlanRefusal):
            return _refuse(match, Code.BUDGET, found.reason, found.remedy)
        plans.append(found)
    shard = shard_of(match.region.seed)
    carried = match.region.seed.target in HEAD_OPS
    placeholder = match.weight_placeholder
    loss_output = None
    if isinstance(match, HeadMatch) and not match.region.site.path:
        loss_output = returned_at(match.output)
    value, notes = _value(match, options, loss_output)
    if compute == FP8:
        notes += (
            "features are rounded to float8_e4m3fn, each row with a scale that is a power of two; "
            "gradients are those at the rounded features",
        )
    return PlannedHead(
        match=match,
        plan=plans[0],
        fused_plan=plans[1],
        compute_dtype=compute,
        weight_dtype=weight.dtype,
        weight_input=None if placeholder is None else input_position(placeholder),
        carried=carried,
        gradients=_gradients(match, weight),
        loss_value=value,
        loss_output=loss_output,
        unfusable=why_unfusable(match, weight, compute),
        notes=notes + _dense_targets(match) + _spread(match),
        shard="" if shard is None else shard.encode(),
    )


def _dense_targets(match: HeadMatch | ProgramMatch) -> tuple[str, ...]:
    if not isinstance(match, HeadMatch) or (match.loss.name, match.loss.targets) != (BCE, "dense"):
        return ()
    return (
        "the dense targets are as large as the logits; where they are 0 and 1, "
        "elmo_compile.multi_hot(indices, num_classes), called in the compiled function, is never "
        "built",
    )


def _spread(match: HeadMatch | ProgramMatch) -> tuple[str, ...]:
    shard = shard_of(match.region.seed)
    if shard is None:
        return ()
    return (
        f"the outputs are spread over {shard.world} processes, of which this one has "
        f"{shard.count}; the features and targets of all are gathered, in forward and in backward",
    )


def compute_dtype(stored: torch.dtype, program: torch.dtype, device: str) -> torch.dtype:
    """Operands as the program has them, or as the storage needs them where that is narrower."""
    kind: Any = "cuda" if device == "cuda" else "cpu"
    storage = default_compute_dtype(stored, kind)
    chosen = storage if storage.itemsize < program.itemsize else program
    return torch.float32 if chosen == torch.float16 and kind == "cpu" else chosen


def why_unfusable(
    match: HeadMatch | ProgramMatch, weight: torch.Tensor, compute: torch.dtype
) -> str:
    """The graph's own reason against a fused update, or an empty string."""
    region = match.region
    if not region.grad_enabled:
        return "gradients are off"
    if isinstance(match, ProgramMatch):
        if len(match.xs) > 1:
            return "the loss is made from the logits of two heads"
        if match.program.backward is None:
            return "no gradient passes what is computed from the logits"
    if cut_from(match.weight_origin) is not None:
        return "the loss reads a part of the weight's outputs"
    if match.weight_placeholder is None:
        return "the weight is computed in the graph"
    if not weight.requires_grad:
        return "the weight is frozen"
    if match.compute_dtype == torch.float16 and weight.dtype != torch.float16:
        return "float16 autocast: GradScaler must see the gradient first"
    if match.weight in match.kept or not _only_reader(match.weight_origin, region):
        return "something else in the graph reads the weight (tied or shared)"
    for node in region.site.graph.nodes:
        if node.op == "call_function" and node.target is torch.autograd.grad:
            return "the graph calls torch.autograd.grad"
    return ""


def _only_reader(placeholder: fx.Node, region: Region) -> bool:
    """Whether the region alone reads the weight, at every level of checkpointing."""
    inside = set(region.nodes)
    if any(user not in inside for user in placeholder.users):
        return False
    node = placeholder
    for call in reversed(region.site.path):
        body = list(node.graph.find_nodes(op="placeholder"))
        outer = call.args[1 + body.index(node)]
        if not isinstance(outer, fx.Node) or set(outer.users) != {call}:
            return False
        if sum(arg is outer for arg in call.args) != 1:
            return False
        node = outer
    return True


def input_position(placeholder: fx.Node) -> int:
    """Position of a top-level placeholder."""
    return list(placeholder.graph.find_nodes(op="placeholder")).index(placeholder)


def returned_at(node: fx.Node) -> int | None:
    """Position among the graph's outputs of a node nothing else reads, or None."""
    (output,) = node.graph.find_nodes(op="output")
    results = output.args[0]
    if set(node.users) != {output} or not isinstance(results, tuple | list):
        return None
    positions = [i for i, result in enumerate(results) if result is node]
    return positions[0] if len(positions) == 1 else None


def unmatched_lowp(module: fx.GraphModule, taken: Iterable[fx.Node]) -> list[fx.Node]:
    """Converted and sharded heads that stay: products no region has replaced."""
    skip = set(taken)
    return [node for node in module.graph.nodes if node.target in HEAD_OPS and node not in skip]


def _value(
    match: HeadMatch | ProgramMatch, options: Options, loss_output: int | None
) -> tuple[LossValue, tuple[str, ...]]:
    if match.loss.name == CE or isinstance(match, ProgramMatch) or options.loss_value == "exact":
        return "exact", ()
    if options.loss_value == "auto" and is_sharded(match.region.seed):
        # A loss that one process reads before backward() would wait for the others.
        return "exact", (
            "the loss is computed in forward, by a product of its own: in a sharded head all "
            "processes compute it together. loss_value='deferred' saves the product",
        )
    if loss_output is None:
        why = "loss_value='deferred' was refused: the loss is not returned as it is"
        return "exact", (why,) if options.loss_value == "deferred" else ()
    target = match.aten.origin(match.target) if match.target.op == "placeholder" else None
    kept = match.loss.targets != "dense" or (target is not None and target.op == "placeholder")
    if options.loss_value == "auto" and not kept:
        return "exact", ()  # A dense matrix the graph makes is not kept for later.
    return options.loss_value, ()


def _shape(
    match: HeadMatch | ProgramMatch,
    weight: torch.Tensor,
    x: torch.Tensor,
    compute: torch.dtype,
    options: Options,
    fused: bool,
) -> HeadShape:
    L, D = hints(weight.shape)
    rows, numbers = _size(match.rows, "n")
    shard = shard_of(match.region.seed)
    if shard is not None:  # the rows of all processes, this one's outputs
        L = shard.count
        rows = rows * shard.world
    positives: Any = 0
    dense = torch.float32
    program: ProgramSize | None = None
    if isinstance(match, ProgramMatch):
        backward = match.program.backward
        program = ProgramSize(
            forward=match.program.forward.products,
            backward=0 if backward is None else backward.products,
            live=match.program.live,
        )
    else:
        target = tensor_of(match.target)
        assert target is not None
        if match.loss.targets not in ("classes", "dense"):
            positives, more = _size(target.numel(), "m")
            numbers |= more
        given = target.dtype if match.loss.targets == "dense" else torch.float32
        dense = match.target_built or given
    return HeadShape(
        rows=rows,
        features=D,
        outputs=L,
        loss=match.loss,
        weight_dtype=weight.dtype,
        feature_dtype=x.dtype,
        compute_dtype=torch.bfloat16 if compute == FP8 else compute,
        has_bias=match.bias is not None,
        positives=positives,
        dense_target_dtype=dense,
        logits_upcast=match.logits_upcast,
        features_trainable=match.aten.requires_grad(match.x),
        weight_trainable=weight.requires_grad and bool(match.region.grad_enabled),
        fused_update=fused,
        device="cuda" if weight.device.type == "cuda" else "cpu",
        loss_value=options.loss_value if fused else "exact",
        at_once=_may_form_gradients_at_once(match, weight, x),
        hints=numbers,
        program=program,
    )


def _gradients(match: HeadMatch | ProgramMatch, weight: torch.Tensor) -> tuple[bool, bool, bool]:
    """Whether features, weight and bias may be asked for a gradient."""
    bias = match.bias
    return (
        match.aten.requires_grad(match.x),
        weight.requires_grad,
        bias is not None and match.aten.requires_grad(bias),
    )


def _may_form_gradients_at_once(
    match: HeadMatch | ProgramMatch, weight: torch.Tensor, x: torch.Tensor
) -> bool:
    """Whether the forward may form the gradients: of a reduced loss, once.

    Not inside a checkpoint, which runs the forward twice, and not in float16, where the upstream
    gradient carries the scale that keeps them from underflowing.
    """
    if isinstance(match, ProgramMatch) or match.loss.reduction == "none":
        return False
    if is_sharded(match.region.seed):
        return False
    if match.region.site.path or not match.region.grad_enabled:
        return False
    return torch.float16 not in (weight.dtype, x.dtype, match.compute_dtype)


def _size(size: Any, name: str) -> tuple[Any, dict[Any, int]]:
    """A size as the planner takes it: an int, at least 1, or a symbol with its traced number."""
    if isinstance(size, int):
        return max(1, size), {}
    symbol = sympy.Symbol(name)
    return symbol, {symbol: max(1, hint(size))}


def _limits(device: str) -> Any:
    if device == "cuda":
        return limits_for("cuda", torch.cuda.get_device_properties(0).L2_cache_size)
    return limits_for("cpu")


def _check(
    match: HeadMatch | ProgramMatch, weight: torch.Tensor, options: Options
) -> Refusal | None:
    if options.compute == FP8 and weight.dtype != FP8:
        return _refuse(
            match, Code.UNSUPPORTED_DTYPE,
            f"compute_dtype=float8_e4m3fn with a weight stored in {weight.dtype}",
            "convert_head(model, dtype=torch.float8_e4m3fn), or another compute_dtype",
        )  # fmt: skip
    if weight.dtype not in WEIGHT_DTYPES:
        return _refuse(
            match, Code.UNSUPPORTED_DTYPE, f"a weight stored in {weight.dtype}",
            "store it in float32, bfloat16, float16 or float8_e4m3fn",
        )  # fmt: skip
    wide = isinstance(match, HeadMatch) and torch.float64 in (weight.dtype, match.compute_dtype)
    if wide and weight.device.type == "cuda":
        return _refuse(
            match, Code.UNSUPPORTED_DTYPE, "float64 on CUDA, for which there are no kernels",
            "train the head in float32, bfloat16 or float8_e4m3fn",
        )  # fmt: skip
    if weight.device.type not in ("cpu", "cuda"):
        return _refuse(
            match, Code.UNSUPPORTED_DEVICE, f"a weight on {weight.device}", "use a CPU or CUDA"
        )
    return None


def _refuse(match: HeadMatch | ProgramMatch, code: Code, reason: str, remedy: str) -> Refusal:
    seed = match.region.seed
    return Refusal(code=code, node=seed.name, source=source_of(seed), reason=reason, remedy=remedy)
