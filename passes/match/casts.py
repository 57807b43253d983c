"""ATen ops that keep values: casts, copies, transposes; and which casts may be left out."""

from __future__ import annotations

import torch
import torch.fx as fx

from elmo_compile.passes.graphs import args_of, tensor_of
from elmo_compile.passes.match.state import Kind

aten = torch.ops.aten

CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.other})
SAME = frozenset(
    {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.lift_fresh.default}
)
TRANSPOSES = frozenset(
    {
        aten.t.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.transpose.int,
        aten.permute.default,
    }
)


def keeps_values(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    """Whether a cast is one that a product's operand dtype accounts for.

    Not: to another device, to integers, or wider after a cast that was narrower (a rounding the
    program asked for, such as a simulated quantization).
    """
    source = args_of(node)[0]
    before, after = tensor_of(source), tensor_of(node)
    assert before is not None
    assert after is not None
    if not after.is_floating_point() or before.device != after.device:
        return False
    return after.itemsize <= before.itemsize or not _was_narrowed(source, kinds)


def _was_narrowed(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    """Whether logits, or a weight, were cast to fewer bytes on the way to `node`."""
    known, now = kinds.get(node), tensor_of(node)
    if known is None or now is None:
        return False
    for source in node.all_input_nodes:
        before = tensor_of(source)
        narrower = before is not None and before.itemsize > now.itemsize
        of_interest = type(kinds.get(source)) is type(known) or source.op == "placeholder"
        if of_interest and node.target in CASTS and narrower:
            return True
        if type(kinds.get(source)) is type(known) and _was_narrowed(source, kinds):
            return True
    return False
