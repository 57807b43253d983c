"""The rule for what may stand between the product and the loss: casts, views and row slices.

They are remembered as operations on the rows of x, with which the product commutes:
(S x) W^T = S (x W^T) for any rearrangement or selection S of rows.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.fx as fx

from elmo_compile.passes.graphs import args_of, hint, hints, tensor_of
from elmo_compile.passes.match.casts import CASTS, SAME, TRANSPOSES, keeps_values
from elmo_compile.passes.match.state import Kind, Logits
from elmo_compile.passes.records import RowOp

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


def rearranged_rows(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> Kind | None:
    """Casts, views, transposes and slices of logits that keep every output -> Logits."""
    source = args_of(node)[0] if args_of(node) else None
    known = kinds.get(source) if isinstance(source, fx.Node) else None
    before, after = tensor_of(source), tensor_of(node)
    if not isinstance(known, Logits) or before is None or after is None:
        return None
    target, rank = node.target, before.ndim
    if target in CASTS:
        if not keeps_values(node, kinds):
            return None
        return dataclasses.replace(known, upcast=known.upcast or after.itemsize > before.itemsize)
    if target in SAME:
        return known
    if known.class_dim == "second":
        return None
    if target in TRANSPOSES:
        return _transposed(known, node, rank)
    if hints(after.shape)[-1:] != (L,):
        return None
    if target in _VIEWS:
        D = _features(known)
        return _with(known, RowOp(aten.reshape.default, ([*args_of(node)[1][:-1], D],)))
    if target is aten.flatten.using_ints:
        start, end = (dim % rank for dim in (*args_of(node)[1:3], 0, -1)[:2])
        return _with(known, RowOp(target, (start, end))) if end < rank - 1 else None
    if target in (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim):
        dim = args_of(node)[1] if len(args_of(node)) > 1 else 0
        dim = dim + rank + (target is aten.unsqueeze.default) if dim < 0 else dim
        if dim >= rank - (target is not aten.unsqueeze.default):
            return known if _keeps_all(node, L) else None
        return _with(known, RowOp(target, (dim, *args_of(node)[2:])))
    if target is aten.index.Tensor and len(args_of(node)[1]) < rank:
        return _with(known, RowOp(target, tuple(args_of(node)[1:])))
    if target in (aten.index_select.default,) and args_of(node)[1] % rank != rank - 1:
        return _with(known, RowOp(target, tuple(args_of(node)[1:])))
    return None


def _with(logits: Logits, op: RowOp) -> Logits:
    return dataclasses.replace(logits, row_ops=(*logits.row_ops, op))


def _keeps_all(node: fx.Node, L: int) -> bool:
    """`z[..., :]`: a slice of the outputs that keeps all of them."""
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (*args_of(node)[2:5], None, None, None)[:3]
    return (
        start in (0, None)
        and step in (1, None)
        and (end is None or (isinstance(end, int) and end >= L))
    )


def _transposed(known: Logits, node: fx.Node, rank: int) -> Logits | None:
    """A permutation of rows, or one that moves the outputs to dimension 1 (torch's class dim)."""
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in args_of(node)[1]]
    elif node.target is aten.transpose.int:
        a, b = (dim % rank for dim in args_of(node)[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order = (
            order[::-1] if node.target is not aten.mT.default else [*order[:-2], rank - 1, rank - 2]
        )
    where = order.index(rank - 1)
    rows = [dim for dim in order if dim != rank - 1]
    if where not in (1, rank - 1) or rank < 2:
        return None
    moved = known
    if rows != sorted(rows):
        moved = _with(known, RowOp(aten.permute.default, ([*rows, rank - 1],)))
    return dataclasses.replace(moved, class_dim="last" if where == rank - 1 else "second")


def _features(logits: Logits) -> int:
    x = tensor_of(logits.x)
    assert x is not None
    return hint(x.shape[-1])
