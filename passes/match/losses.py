"""Rules for losses and for what may follow them: reductions, casts and scalings by numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx as fx

from elmo_compile.numerics.losses import BCE, CE, LossSpec, Reduction
from elmo_compile.passes.graphs import args_of, tensor_of, value_of
from elmo_compile.passes.match.casts import CASTS, SAME
from elmo_compile.passes.match.refuse import NoMatch
from elmo_compile.passes.match.state import Extent, Kind, Logits, Loss
from elmo_compile.passes.match.targets import target_of
from elmo_compile.passes.records import AtenRegion, RowOp
from elmo_compile.report.records import Code

aten = torch.ops.aten
_REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "sum")


def softmax_cross_entropy(
    node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion
) -> Kind | None:
    """cross_entropy(logits, class ids) -> Loss."""
    if node.target is not aten.cross_entropy_loss.default:
        return None
    names = ("logits", "target", "weight", "reduction", "ignore", "smoothing")
    given = dict(zip(names, args_of(node)))
    logits = _logits(node, given["logits"], kinds)
    target = given["target"]
    classes, z = tensor_of(target), tensor_of(given["logits"])
    assert classes is not None
    assert z is not None
    if given.get("weight") is not None:
        raise _argument(
            node, "class weights (weight=)", "apply a per-row weight to reduction='none'"
        )
    if given.get("smoothing", 0.0) != 0.0:
        raise _argument(node, "label smoothing", "use label_smoothing=0")
    if classes.dtype != torch.int64 or target in kinds:
        raise NoMatch(
            Code.UNSUPPORTED_TARGET, node,
            f"cross entropy with targets that are not class ids ({classes.dtype})",
            "give class ids (int64)",
        )  # fmt: skip
    if z.ndim > 2 and logits.class_dim != "second":
        raise NoMatch(
            Code.UNSUPPORTED_SHAPE, node,
            "dimension 1 of these logits, the classes for cross_entropy, is not the outputs",
            "flatten the logits to [N, num_outputs]",
        )  # fmt: skip
    reduction = _REDUCTIONS[given.get("reduction", 1)]
    ignore = given.get("ignore", -100)
    spec = LossSpec(name=CE, targets="classes", reduction=reduction, ignore_index=ignore)
    flat = RowOp(aten.reshape.default, ([-1],))
    extent: Extent = "rows" if reduction == "none" else "scalar"
    rows = z.numel() // L
    return Loss(logits, spec, target, None, (flat,), None, rows, extent)


def sigmoid_bce(
    node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion
) -> Kind | None:
    """binary_cross_entropy_with_logits(logits, targets) -> Loss."""
    if node.target is not aten.binary_cross_entropy_with_logits.default:
        return None
    given = dict(zip(("logits", "target", "weight", "pos_weight", "reduction"), args_of(node)))
    logits = _logits(node, given["logits"], kinds)
    for name in ("weight", "pos_weight"):
        if given.get(name) is not None:
            raise _argument(node, f"{name}=", f"leave {name} out")
    z = tensor_of(given["logits"])
    assert z is not None
    targets = target_of(given["target"], kinds, z.shape)
    if targets is None or targets.node is None or logits.class_dim != "last":
        raise NoMatch(
            Code.UNSUPPORTED_TARGET, node, "these targets are not understood",
            "give a dense [N, num_outputs] tensor or elmo_compile.multi_hot(indices, num_outputs)",
        )  # fmt: skip
    dense = tensor_of(given["target"])
    if targets.form == "dense" and region.requires_grad(given["target"]):
        raise NoMatch(
            Code.UNSUPPORTED_TARGET, node, "the targets require a gradient", "detach the targets"
        )
    spec = LossSpec(
        name=BCE, targets=targets.spec_form, duplicates=targets.duplicates,
        reduction=_REDUCTIONS[given.get("reduction", 1)],
    )  # fmt: skip
    built = None if targets.form == "dense" or dense is None else dense.dtype
    extent: Extent = "elements" if spec.reduction == "none" else "scalar"
    rows = z.numel() // L
    return Loss(logits, spec, targets.node, targets.aux, targets.row_ops, built, rows, extent)


def reduced(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion) -> Kind | None:
    """sum or mean of an unreduced loss, over outputs or over everything."""
    known = _loss(node, kinds)
    if known is not None and known.extent == "scalar":
        whole = node.target in (aten.sum.default, aten.mean.default)
        return known if whole and value_of(node).is_floating_point() else None
    if known is None or known.spec.reduction != "none" or not value_of(node).is_floating_point():
        return None
    before = tensor_of(args_of(node)[0])
    assert before is not None
    mean = node.target in (aten.mean.default, aten.mean.dim)
    last: tuple[Any, ...] = (L,) if known.extent == "elements" else ()
    sizes: tuple[Any, ...] = ("rows", *last)
    if node.target in (aten.sum.default, aten.mean.default):
        over_rows = _summed(known)
    elif node.target in (aten.sum.dim_IntList, aten.mean.dim):
        dims = [dim % before.ndim for dim in args_of(node)[1] or range(before.ndim)]
        keepdim = args_of(node)[2] if len(args_of(node)) > 2 else False
        if keepdim:
            return None
        if len(dims) == before.ndim:
            over_rows = _summed(known)
        elif dims == [before.ndim - 1] and known.extent == "elements":
            over_rows, sizes = dataclasses.replace(known, extent="rows"), last
        else:
            return None
    else:
        return None
    return dataclasses.replace(over_rows, divisors=over_rows.divisors + (sizes if mean else ()))


def scaled(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion) -> Kind | None:
    """A loss cast, or multiplied or divided by a number or a size."""
    known = _loss(node, kinds)
    if known is None or known.extent == "elements":
        return None
    if node.target in CASTS or node.target in SAME:
        before, out = tensor_of(args_of(node)[0]), tensor_of(node)
        assert before is not None
        assert out is not None
        return known if out.is_floating_point() and out.device == before.device else None
    if node.target in (aten.div.Tensor, aten.div.Scalar) and not node.kwargs:
        return _divided(known, args_of(node)[1])
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        by = args_of(node)[1]
        return (
            dataclasses.replace(known, scale=known.scale * by)
            if isinstance(by, int | float)
            else None
        )
    return None


def _divided(loss: Loss, by: Any) -> Loss | None:
    if isinstance(by, int | float) and not isinstance(by, bool) and by != 0:
        return dataclasses.replace(loss, scale=loss.scale / by)
    if isinstance(by, fx.Node) and isinstance(value_of(by), torch.SymInt):
        return dataclasses.replace(loss, divisors=(*loss.divisors, by))
    return None


def _summed(loss: Loss) -> Loss:
    spec = dataclasses.replace(loss.spec, reduction="sum")
    return dataclasses.replace(loss, spec=spec, extent="scalar")


def _loss(node: fx.Node, kinds: dict[fx.Node, Kind]) -> Loss | None:
    source = args_of(node)[0] if args_of(node) else None
    known = kinds.get(source) if isinstance(source, fx.Node) else None
    return known if isinstance(known, Loss) else None


def _logits(node: fx.Node, operand: Any, kinds: dict[fx.Node, Kind]) -> Logits:
    known = kinds.get(operand)
    if not isinstance(known, Logits):
        raise NoMatch(
            Code.UNKNOWN_LOSS, node, "what this loss is given is not the head's logits as they are",
            "pass the logits themselves as the first argument",
        )  # fmt: skip
    return known


def _argument(node: fx.Node, what: str, remedy: str) -> NoMatch:
    return NoMatch(
        Code.UNSUPPORTED_ARGUMENT, node, f"{what} is not supported by the chunked loss", remedy
    )
