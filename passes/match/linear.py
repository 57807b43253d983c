"""Rules for the product with the weight: views of the weight, the product itself, its bias.

`linear`, `matmul`, `mm`, `addmm`, `einsum` and the op of a converted head all become `Logits`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx as fx

from elmo_compile import ops
from elmo_compile.passes.graphs import args_of, hint, hints, tensor_of
from elmo_compile.passes.match.casts import CASTS, SAME, TRANSPOSES, keeps_values
from elmo_compile.passes.match.refuse import NoMatch
from elmo_compile.passes.match.state import Kind, Logits, WeightView
from elmo_compile.report.records import Code

aten = torch.ops.aten
ops.load()

HEAD_OPS = (torch.ops.elmo.lowp_linear.default, torch.ops.elmo.sharded_linear.default)
"""Products of converted and of sharded heads: (x, weight, bias, carrier, ...)."""


def linear_head(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> Kind | None:
    """x W^T (+ b) in any spelling -> Logits."""
    target, args = node.target, args_of(node)
    x: Any
    w: Any
    bias: Any = None
    if target is aten.linear.default:
        x, w, bias = args[0], args[1], args[2] if len(args) > 2 else None
        weight = _weight(w, kinds, want_transposed=False)
    elif target in HEAD_OPS:
        x, w, bias = args[:3]
        weight = _weight(w, kinds, want_transposed=False)
    elif target in (aten.matmul.default, aten.mm.default):
        x, w = args
        weight = _weight(w, kinds, want_transposed=True)
    elif target is aten.addmm.default and not any(
        node.kwargs.get(k, 1) != 1 for k in ("beta", "alpha")
    ):
        bias, x, w = args
        weight = _weight(w, kinds, want_transposed=True)
    elif target is aten.einsum.default:
        x, weight = _einsum(node, kinds, L)
    else:
        return None
    if weight is None or not isinstance(x, fx.Node) or x in kinds:
        raise NoMatch(
            Code.WEIGHT_COMPUTED,
            node,
            "the weight of this product is not a [num_outputs, num_features] tensor of its own",
            "store the head's weight as a Parameter of shape [num_outputs, num_features]",
        )
    _check_bias(node, bias, L)
    out = tensor_of(node)
    assert out is not None
    return Logits(x=x, weight=weight, bias=bias, compute_dtype=out.dtype)


def weight_view(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> Kind | None:
    """`w.t()`, `w.T`, `w.mT`, casts of w -> WeightView."""
    source = args_of(node)[0] if args_of(node) else None
    if not isinstance(source, fx.Node):
        return None
    known = kinds.get(source)
    if known is None and source.op == "placeholder":
        tensor = tensor_of(source)
        if tensor is not None and tensor.ndim == 2 and hint(tensor.shape[0]) == L:
            known = WeightView(source, False)
    if not isinstance(known, WeightView):
        return None
    if node.target in TRANSPOSES:
        before, after = tensor_of(source), tensor_of(node)
        assert before is not None
        assert after is not None
        swapped = hints(before.shape) == hints(after.shape)[::-1]
        dims = args_of(node)[1:]
        identity = node.target is aten.permute.default and list(dims[0]) in ([0, 1], [-2, -1])
        if node.target is aten.transpose.int and dims[0] == dims[1]:
            identity = True
        return known if identity or not swapped else WeightView(known.node, not known.transposed)
    if node.target in CASTS and not keeps_values(node, kinds):
        return None
    return known if node.target in CASTS or node.target in SAME else None


def add_bias(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> Kind | None:
    """logits + b, b of shape [L] -> Logits with a bias."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    for logits, other in (args_of(node), args_of(node)[::-1]):
        known = kinds.get(logits) if isinstance(logits, fx.Node) else None
        tensor = tensor_of(other)
        if isinstance(known, Logits) and tensor is not None and hints(tensor.shape) == (L,):
            if not tensor.is_floating_point():  # Numbers or a mask: no bias, an operand.
                return None
            if known.bias is not None or known.class_dim != "last" or other in kinds:
                return None
            return dataclasses.replace(known, bias=other)
    return None


def _weight(node: Any, kinds: dict[fx.Node, Kind], *, want_transposed: bool) -> fx.Node | None:
    """The [L, D] node behind a product's weight operand, or None."""
    known = kinds.get(node) if isinstance(node, fx.Node) else None
    if isinstance(known, WeightView):
        return known.node if known.transposed == want_transposed else None
    if isinstance(node, fx.Node) and node.op == "placeholder" and not want_transposed:
        tensor = tensor_of(node)
        return node if tensor is not None and tensor.ndim == 2 else None
    return None


def _einsum(node: fx.Node, kinds: dict[fx.Node, Kind], L: int) -> tuple[Any, fx.Node | None]:
    """`bd,vd->bv`, `...d,vd->...v`, with any letters and either operand order."""
    equation, operands = args_of(node)[0].replace(" ", ""), list(args_of(node)[1])
    equation = equation.replace("...", "@")  # One letter for any leading dimensions.
    left, _, out = equation.partition("->")
    terms = left.split(",")
    if len(operands) != 2 or len(terms) != 2 or not out or "." in equation:
        return None, None
    for (x, x_term), (w, w_term) in (
        tuple(zip(operands, terms)),
        tuple(zip(operands[::-1], terms[::-1])),
    ):
        if len(set(w_term)) != 2 or len(w_term) != 2 or len(set(x_term)) != len(x_term):
            continue
        if "@" in w_term:
            continue
        for wanted in (False, True):
            label, contracted = w_term if not wanted else w_term[::-1]
            if x_term[-1:] == contracted and out == x_term[:-1] + label:
                weight = _weight(w, kinds, want_transposed=wanted)
                if weight is not None:
                    return x, weight
    return None, None


def _check_bias(node: fx.Node, bias: Any, L: int) -> None:
    tensor = tensor_of(bias)
    if bias is not None and (tensor is None or hints(tensor.shape) != (L,)):
        raise NoMatch(
            Code.UNSUPPORTED_SHAPE,
            node,
            "the bias is not a vector with one element an output",
            "give the head a bias of shape [num_outputs]",
        )
