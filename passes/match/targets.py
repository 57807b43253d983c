"""Rules for multi-label targets: dense matrices, and matrices the program builds from indices.

`multi_hot`, zeros + scatter_, zeros + index_put_ and one_hot().sum() are recognised, so that the
[N, L] matrix is not built.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.fx as fx

from elmo_compile.numerics.losses import TargetForm
from elmo_compile.passes.graphs import args_of, hint, hints, same_shape, same_size, tensor_of
from elmo_compile.passes.match.casts import CASTS, SAME
from elmo_compile.passes.match.state import Kind, OneHot, Targets
from elmo_compile.passes.records import AtenRegion, RowOp

aten = torch.ops.aten

_ZEROS = frozenset(
    {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default, aten.full.default,
     aten.new_full.default, aten.full_like.default}
)  # fmt: skip
_ONES = frozenset({aten.ones.default, aten.ones_like.default, aten.new_ones.default})
_FULLS = frozenset({aten.full.default, aten.new_full.default, aten.full_like.default})
_SCATTERS = frozenset(
    {aten.scatter_.value, aten.scatter.value, aten.scatter_.src, aten.scatter.src}
)


def zeros(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion) -> Kind | None:
    """zeros [N, L] -> Targets with no positives yet."""
    tensor = tensor_of(node)
    if node.target not in _ZEROS or tensor is None or hints(tensor.shape)[-1:] != (L,):
        return None
    if node.target in _FULLS:
        value = (
            args_of(node)[-1]
            if node.target is aten.full_like.default
            else args_of(node)[1 + (node.target is aten.new_full.default)]
        )
        if value != 0:
            return None
    return Targets("zeros") if tensor.ndim == 2 else None


def multi_hot(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion) -> Kind | None:
    """elmo.multi_hot(indices, L) -> its indices."""
    if node.target is not torch.ops.elmo.multi_hot.default or args_of(node)[1] != L:
        return None
    offsets = args_of(node)[2] if len(args_of(node)) > 2 else None
    form: TargetForm = "padded" if offsets is None else "flat"
    return Targets("ones_at", form, args_of(node)[0], offsets)


def scattered(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion) -> Kind | None:
    """zeros.scatter_(1, indices, 1) -> indices."""
    if node.target not in _SCATTERS or not _from_zeros(node, kinds):
        return None
    _, dim, indices, value = args_of(node)[:4]
    tensor = tensor_of(indices)
    one = _is_one(value, region) if isinstance(value, fx.Node) else value == 1
    if dim not in (1, -1) or node.kwargs.get("reduce") or not one or tensor is None:
        return None
    zeros_value = tensor_of(node)
    assert zeros_value is not None
    if tensor.ndim != 2 or not same_size(tensor.shape[0], zeros_value.shape[0]):
        return None
    return Targets("ones_at", "indices", indices)


def put(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion) -> Kind | None:
    """zeros[rows, columns] = 1 -> (row, column) pairs."""
    if node.target not in (aten.index_put_.default, aten.index_put.default):
        return None
    if (
        not _from_zeros(node, kinds)
        or len(args_of(node)[1]) != 2
        or (len(args_of(node)) > 3 and args_of(node)[3])
    ):
        return None
    rows, columns = args_of(node)[1]
    tensors = tensor_of(rows), tensor_of(columns)
    if any(t is None or t.dtype not in (torch.int64, torch.int32) for t in tensors):
        return None
    if not _is_one(args_of(node)[2], region):
        return None
    return Targets("ones_at", "pairs", rows, columns)


def one_hot(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion) -> Kind | None:
    """one_hot(indices, L) -> OneHot, or targets with one positive a row."""
    if node.target is not aten.one_hot.default or args_of(node)[1] != L:
        return None
    tensor = tensor_of(args_of(node)[0])
    return OneHot(args_of(node)[0]) if tensor is not None and tensor.ndim in (1, 2) else None


def one_hot_sum(
    node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion
) -> Kind | None:
    """one_hot(indices [N, P], L).sum(1) -> indices, repeats counted; .amax(1): once."""
    source = args_of(node)[0] if args_of(node) else None
    known = kinds.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(known, OneHot):
        return None
    if node.target in CASTS or node.target in SAME:
        return known
    tensor = tensor_of(source)
    if node.target not in (aten.sum.dim_IntList, aten.amax.default) or tensor is None:
        return None
    keepdim = args_of(node)[2] if len(args_of(node)) > 2 else False
    if tensor.ndim != 3 or keepdim or list(args_of(node)[1]) not in ([1], [-2]):
        return None
    repeats: Literal["once", "count"] = "count" if node.target is aten.sum.dim_IntList else "once"
    return Targets("ones_at", "indices", known.indices, duplicates=repeats)


def clamped(node: fx.Node, kinds: dict[fx.Node, Kind], L: int, region: AtenRegion) -> Kind | None:
    """Casts of targets; clamp(max=1), `> 0` and bool() of counts -> repeats count once."""
    source = args_of(node)[0] if args_of(node) else None
    known = kinds.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(known, Targets) or known.form != "ones_at":
        return None
    out = tensor_of(node)
    if (node.target in CASTS or node.target in SAME) and out is not None:
        return dataclasses.replace(known, duplicates="once") if out.dtype == torch.bool else known
    low, high = (*args_of(node)[1:3], None, None)[:2]
    ceiling = node.target is aten.clamp.default and low in (None, 0) and high == 1
    if node.target is aten.clamp_max.default and args_of(node)[1] == 1:
        ceiling = True
    if ceiling or (node.target is aten.gt.Scalar and args_of(node)[1] == 0):
        return dataclasses.replace(known, duplicates="once")
    return None


def target_of(node: Any, kinds: dict[fx.Node, Kind], logits_shape: torch.Size) -> Targets | None:
    """What a loss's target operand is: known sparse targets, or a dense matrix as it is."""
    if not isinstance(node, fx.Node):
        return None
    known = kinds.get(node)
    if isinstance(known, OneHot):
        tensor = tensor_of(node)
        if tensor is not None and tensor.ndim == 2:
            column = RowOp(aten.unsqueeze.default, (1,))
            return Targets("ones_at", "indices", known.indices, row_ops=(column,))
        return None
    if isinstance(known, Targets):
        return known if known.form == "ones_at" else None
    tensor = tensor_of(node)
    if known is not None or tensor is None or not same_shape(tensor.shape, logits_shape):
        return None
    L = hint(logits_shape[-1])
    ops = () if tensor.ndim == 2 else (RowOp(aten.reshape.default, ([-1, L],)),)
    return Targets("dense", "dense", node, row_ops=ops)


def _from_zeros(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    """Whether the written tensor is all zeros, and no view of it was taken before."""
    source = args_of(node)[0]
    known = kinds.get(source) if isinstance(source, fx.Node) else None
    return isinstance(known, Targets) and known.form == "zeros" and len(source.users) == 1


def _is_one(node: Any, region: AtenRegion) -> bool:
    """Whether a tensor operand is known to hold only ones."""
    if not isinstance(node, fx.Node):
        return False
    if node.target in SAME or node.target in CASTS or node.target is aten.lift_fresh_copy.default:
        return _is_one(args_of(node)[0], region)
    if node.target in (aten.expand.default, aten.view.default, aten.reshape.default):
        return _is_one(args_of(node)[0], region)
    if node.op == "get_attr":
        constant = getattr(region.module, str(node.target), None)
        return isinstance(constant, torch.Tensor) and constant.numel() == 1 and _item(constant) == 1
    if node.op == "placeholder":
        origin = region.origin(node)
        only_here = all(user in region.region.nodes for user in origin.users)
        return only_here and _makes_ones(origin)
    return node.target in _ONES or (node.target is aten.full.default and args_of(node)[1] == 1)


def _item(constant: torch.Tensor) -> Any:
    """The value of a constant, also where it is a fake tensor that remembers one."""
    known = getattr(constant, "constant", None)
    return (constant if known is None else known).item()


def _makes_ones(node: fx.Node) -> bool:
    """Whether a Dynamo node is a call such as `torch.ones_like(...)`."""
    if node.op == "call_function":
        if node.target is torch.tensor:
            return args_of(node)[:1] in ((1,), (1.0,))
        return node.target in (torch.ones, torch.ones_like)
    return node.op == "call_method" and node.target == "new_ones"
